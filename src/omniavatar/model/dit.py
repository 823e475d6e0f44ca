"""OmniAvatar's diffusion transformer: Wan 2.1 T2V with 33 input channels and audio added between blocks.

Plain maths on one device. What is the same in all steps is computed once and passed in as data:
`prepare_text` (cross-attention keys and values, once for a prompt) and `prepare_audio` (once for a window).
`forward(..., run_blocks=)` is the seam for step caches, sharding and offloading: any function with the
signature of `WanDiT.run_blocks` may replace it. State-dict keys are those of the released files.
With `audio_tokens` there is no text: cross-attention sees audio tokens (`prepare_audio_tokens`), which take
the text's place in `forward`.
Sources: Wan 2.1 (arXiv 2503.20314), OmniAvatar (arXiv 2506.18866), SoulX-FlashHead (its inference code).

Shapes: B batch, T latent frames, h w latent pixels, L = T*h/2*w/2 tokens, C width, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from omniavatar.model.attention import AttentionFn
from omniavatar.model.audio_adapter import AudioPack
from omniavatar.model.audio_tokens import AttentionByFrame, AudioTokens
from omniavatar.model.layers import Block, BlockInputs, modulate
from omniavatar.model.rope import RopeTable, rope_table
from omniavatar.model.sizes import DiTConfig

RunBlocks = Callable[[Tensor, BlockInputs], Tensor]
TextState = tuple[tuple[Tensor, Tensor], ...]
AudioState = tuple[Tensor | None, ...]


class Head(nn.Module):
    """Modulated norm, then the linear layer to latent patches."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x_BLC: Tensor, time_BC: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time_BC.float()[:, None]).chunk(2, dim=1)
        out: Tensor = self.head(modulate(x_BLC, shift, scale, self.eps).to(self.head.weight.dtype))
        return out


class WanDiT(nn.Module):
    """Predicts the flow-matching velocity of a window. `attention` is any `model.attention.AttentionFn`.

    Sequence parallelism wraps `attention`, the self-attention of the video tokens, but not `text_attention`.
    """

    def __init__(self, config: DiTConfig, attention: AttentionFn) -> None:
        super().__init__()
        self.config = config
        self.attention = self.text_attention = attention
        dim, tokens = config.dim, config.audio_tokens
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, stride=config.patch_size)
        if not tokens:
            self.text_embedding = nn.Sequential(
                nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
            )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(dim, config.ffn_dim, config.num_heads, config.eps) for _ in range(config.num_layers)
        )
        patch_volume = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = Head(dim, config.out_dim * patch_volume, config.eps)
        if tokens:
            self.text_attention = AttentionByFrame(attention, tokens)
            self.audio_proj: AudioTokens | AudioPack = AudioTokens(
                config.audio_dim, config.audio_hidden, tokens, dim
            )
        elif config.audio_dim:
            self.audio_proj = AudioPack(config.audio_dim, config.audio_hidden)
            self.audio_cond_projs = nn.ModuleList(
                nn.Linear(config.audio_hidden, dim) for _ in config.audio_blocks
            )

    def prepare_text(self, embedding_BSE: Tensor) -> TextState:
        """Keys and values of every block for text embeddings (B, S, text_dim)."""
        weight = _weight(self.text_embedding[0])
        return self._keys_values(
            self.text_embedding(embedding_BSE.to(device=weight.device, dtype=weight.dtype))
        )

    def prepare_audio_tokens(self, windows_BNWD: Tensor) -> TextState:
        """Keys and values of every block for a clip's audio, in place of those of a text.

        - windows_BNWD: (B, 4T-3, 5, audio_dim), the feature rows that each frame hears. For silence pass
          zeros (the biases still act).
        """
        return self._keys_values(self.audio_proj(windows_BNWD).flatten(1, 2))

    def _keys_values(self, context_BSC: Tensor) -> TextState:
        return tuple(
            block.cross_attn.keys_values(context_BSC.to(_weight(block.cross_attn.k).dtype))
            for block in self._typed_blocks()
        )

    def prepare_audio(self, audio_BND: Tensor | None, continued: bool = False) -> AudioState:
        """What each block adds, (B, T, C) or None, for audio vectors (B, 4T-3, audio_dim).

        For silence pass zeros (the biases still act). None means a model or a use without audio.

        - continued: the vectors (B, 4T, audio_dim) follow earlier ones of the same video.
        """
        per_block: list[Tensor | None] = [None] * self.config.num_layers
        if audio_BND is not None:
            adapter = cast(AudioPack, self.audio_proj)
            packed = adapter(audio_BND.to(adapter.proj.weight.device), continued)
            for index, proj in zip(self.config.audio_blocks, self.audio_cond_projs, strict=True):
                per_block[index] = proj(packed.to(proj.weight.dtype))
        return tuple(per_block)

    def embed_time(self, timestep_B: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding (B, C) and its projection (B, 6, C) for timesteps in 0..1000; float32 inside."""
        half = self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=timestep_B.device) / half
        angles = torch.outer(timestep_B.to(torch.float64), 10000.0**-exponents)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded = self.time_embedding(sinusoid.to(_weight(self.time_embedding[0]).dtype))
        projected = self.time_projection(embedded.to(_weight(self.time_projection[1]).dtype))
        return embedded, projected.unflatten(-1, (6, -1))

    def run_blocks(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        """Tokens after all blocks in order; caches, sharding and graphs wrap this function."""
        for block, text, audio in zip(self.blocks, inputs.text, inputs.audio, strict=True):
            tokens_BLC = block(
                tokens_BLC,
                inputs.modulation,
                inputs.rope,
                text,
                audio,
                self.attention,
                self.text_attention,
            )
        return tokens_BLC

    def forward(
        self,
        sample: Tensor,
        y: Tensor | None,
        timestep_B: Tensor,
        text: TextState,
        audio: AudioState,
        run_blocks: RunBlocks | None = None,
        rope: RopeTable | None = None,
    ) -> Tensor:
        """Velocity (B, 16, T, h, w) float32 of a noisy `sample` of the same shape.

        - y: (B, 17, T, h, w) reference latent and mask (0 given, 1 to generate), or None for plain T2V.
        - timestep_B: (B,) in 0..1000.
        - text, audio: from `prepare_text` and `prepare_audio`.
        - rope: positions of the tokens; None for those of a video's first latent frames.
        """
        x = sample if y is None else torch.cat([sample, y.to(sample.dtype)], dim=1)
        t, h, w = (size // patch for size, patch in zip(x.shape[2:], self.config.patch_size, strict=True))
        embedded, modulation = self.embed_time(timestep_B)
        rope = rope or rope_table((t, h, w), self.config.head_dim, x.device)
        inputs = BlockInputs(modulation, rope, text, audio)
        tokens = (run_blocks or self.run_blocks)(self._embed_patches(x), inputs)
        return self._unpatchify(self.head(tokens, embedded), (t, h, w)).float()

    def _embed_patches(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C) of a sample; the larger patches are freed before the blocks run."""
        patches = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2).to(self._token_dtype).contiguous()

    @property
    def _token_dtype(self) -> torch.dtype:
        """The dtype of tokens: that of the biases of a block's linear layers."""
        return self._typed_blocks()[0].self_attn.o.bias.dtype

    def _typed_blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]

    def _unpatchify(self, x_BLP: Tensor, grid: tuple[int, int, int]) -> Tensor:
        pt, ph, pw = self.config.patch_size
        t, h, w = grid
        x = x_BLP.view(-1, t, h, w, pt, ph, pw, self.config.out_dim)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(x.shape[0], self.config.out_dim, t * pt, h * ph, w * pw)


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)
