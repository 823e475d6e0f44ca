"""Keys and values of earlier blocks of a block-causal video, for every layer of the DiT.

What changes: self-attention writes the keys and values of its tokens into a slot of buffers that are
allocated once, and attends to all filled slots (`sampling.causal` says which slot). Old keys never move, so a
block costs the same however long the video is, and its launches have the same addresses (CUDA graphs).
What it loses: nothing; the sum over the keys has another order than in a buffer that is rolled.
Limits: keys are stored rotated, so a slot keeps the position it was written with.

Shapes: B batch, L tokens of a block, S slots, H heads, D head dim.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.model.layers import Block, BlockInputs
from omniavatar.sampling.causal import CausalWindow


class KeyValueCache:
    """The buffers of one video, or of several side by side: for each layer keys and values (B, S*L, H, D).

    tokens: L.
    videos: B.
    """

    def __init__(
        self,
        dit: WanDiT,
        window: CausalWindow,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        videos: int = 1,
    ) -> None:
        config = dit.config
        shape = (videos, window.slots * tokens, config.num_heads, config.head_dim)
        self.window, self.tokens = window, tokens
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
            for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def attention(self, layer: int, block: int, attend: AttentionFn) -> AttentionFn:
        """Self-attention of `layer` for block number `block`: keeps keys and values, and sees the past."""
        first = self.window.slot(block) * self.tokens
        filled = self.window.filled(block) * self.tokens
        keys, values = self.keys[layer], self.values[layer]

        def cached(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
            if k_BLHD.shape[1] != self.tokens:
                raise ValueError(f"a block has {self.tokens} tokens, not {k_BLHD.shape[1]}")
            keys[:, first : first + self.tokens].copy_(k_BLHD)
            values[:, first : first + self.tokens].copy_(v_BLHD)
            return attend(q_BLHD, keys[:, :filled], values[:, :filled])

        return cached

    def runner(self, dit: WanDiT, block: int) -> RunBlocks:
        """Replaces `WanDiT.run_blocks` for the passes of block number `block`.

        Blocks must come in order. The last pass of a block decides what later blocks see of it.
        """

        def run_blocks(tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
            layers = zip(dit.blocks, inputs.text, inputs.audio, strict=True)
            for layer, (module, text, audio) in enumerate(layers):
                tokens_BLC = cast(Block, module)(
                    tokens_BLC,
                    inputs.modulation,
                    inputs.rope,
                    text,
                    audio,
                    self.attention(layer, block, dit.attention),
                    dit.text_attention,
                )
            return tokens_BLC

        return run_blocks
