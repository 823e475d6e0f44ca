"""The blocks of a forward with self-attention by plan, and with tokens in another order inside.

`SparseBlocks` and `OrderedBlocks` stand in for `WanDiT.run_blocks` (see there for the arguments). Each layer
of the first attends in its own way; the second brings tokens, positions and audio into a `TokenOrder`
before the blocks and the tokens back after them. Nothing in a block depends on the order but the rounding of
sums over keys; the text has no order to follow.

Shapes: B batch, L tokens, C width, T latent frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from omniavatar.accel.attention.sparse import BlockLists, SparseAttentionFn
from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.model.layers import AudioByToken, Block, BlockInputs
from omniavatar.model.rope import RopeTable
from omniavatar.sampling.token_order import TokenOrder


class BoundAttention:
    """An `AttentionFn`: a sparse one with its lists."""

    def __init__(self, attention: SparseAttentionFn, lists: BlockLists) -> None:
        self._attention, self._lists = attention, lists
        self.takes_float8 = getattr(attention, "takes_float8", False)

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        return self._attention(q_BLHD, k_BLHD, v_BLHD, self._lists)


class SparseBlocks:
    """The blocks of `dit`; layer i attends by `attentions[i]`, or by the model's own attention if None."""

    def __init__(self, dit: WanDiT, attentions: Sequence[AttentionFn | None]) -> None:
        self._dit, self._attentions = dit, attentions

    @classmethod
    def of(
        cls, dit: WanDiT, attention: SparseAttentionFn, lists: Sequence[BlockLists | None]
    ) -> SparseBlocks:
        """Each layer attends with its own lists, or densely where it has none."""
        return cls(dit, [None if each is None else BoundAttention(attention, each) for each in lists])

    def __call__(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        dit = self._dit
        layers = zip(dit.blocks, inputs.text, inputs.audio, self._attentions, strict=True)
        for block, text, audio, attention in layers:
            tokens_BLC = cast(Block, block)(
                tokens_BLC,
                inputs.modulation,
                inputs.rope,
                text,
                audio,
                attention or dit.attention,
                dit.text_attention,
            )
        return tokens_BLC


class OrderedBlocks:
    """`run_blocks` on tokens in `order`; takes and gives them as the model makes them."""

    def __init__(self, run_blocks: RunBlocks, order: TokenOrder, device: torch.device) -> None:
        self._run_blocks = run_blocks
        self._tokens = torch.from_numpy(order.tokens).to(device)
        self._places = torch.from_numpy(order.places).to(device)
        self._frames = torch.from_numpy(order.positions[:, 0].copy()).to(device)
        self._grid = order.grid

    def around(self, run_blocks: RunBlocks) -> OrderedBlocks:
        """The same order around other blocks."""
        other = copy.copy(self)
        other._run_blocks = run_blocks
        return other

    def __call__(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        if tokens_BLC.shape[1] != len(self._tokens):
            raise ValueError(f"{tokens_BLC.shape[1]} tokens do not fit an order for a grid of {self._grid}")
        rope = RopeTable(inputs.rope.cos[self._tokens], inputs.rope.sin[self._tokens])
        audio = OrderedAudio(inputs.audio, self._frames)
        ordered = BlockInputs(inputs.modulation, rope, inputs.text, audio)
        out_BLC = self._run_blocks(tokens_BLC.index_select(1, self._tokens), ordered)
        return out_BLC.index_select(1, self._places)


@dataclass(frozen=True, eq=False)
class OrderedAudio(AudioByToken):
    """Audio of tokens in any order."""

    per_frame: Sequence[Tensor | None]
    token_frames: Tensor

    @property
    def frames(self) -> Tensor:
        return self.token_frames
