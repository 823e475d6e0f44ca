"""The transformer block of Wan 2.1 and its parts. One device, no flags.

Shapes: B batch, L video tokens, S text tokens, C model width, H heads, D head dim, T latent frames.
Tokens have the dtype of the weights; norms, modulation, rotation and gates are computed in float32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.model.attention import AttentionFn
from omniavatar.model.rope import RopeTable, rotate


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """The inputs of every block of one forward, except the tokens.

    - modulation: (B, 6, C) float32, the time projection.
    - rope: table of the L tokens.
    - text: for each block keys and values (B, S, H, D).
    - audio: for each block None or (B, T, C); L is a multiple of T.
    """

    modulation: Tensor
    rope: RopeTable
    text: tuple[tuple[Tensor, Tensor], ...]
    audio: Sequence[Tensor | None]


class AudioByToken(Sequence[Tensor | None]):
    """Audio of each block as one vector a token (B, L, C), made when a block reads it.

    - per_frame: for each block None or (B, T, C).
    - frames: the latent frame of each token, (L,).
    """

    per_frame: Sequence[Tensor | None]

    @property
    @abstractmethod
    def frames(self) -> Tensor: ...

    def __len__(self) -> int:
        return len(self.per_frame)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        frame_BTC = self.per_frame[index]
        return None if frame_BTC is None else frame_BTC.index_select(1, self.frames)


@dataclass(frozen=True, eq=False)
class TokenAudio(AudioByToken):
    """Audio of a range of tokens.

    - first, tokens: first token and length of the range.
    - total: tokens of all T frames.
    """

    per_frame: Sequence[Tensor | None]
    first: int
    tokens: int
    total: int

    @cached_property
    def frames(self) -> Tensor:
        """The frame of each token of the range, for all blocks."""
        heard = next(each for each in self.per_frame if each is not None)
        token = torch.arange(self.first, self.first + self.tokens, device=heard.device)
        return token // (self.total // heard.shape[1])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis times a learned scale, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then `x * (1 + scale) + shift`; float32 inside, dtype of x outside."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


class SelfAttention(nn.Module):
    """Attention among the video tokens; q and k are normalised over the full width, then rotated."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(self, x_BLC: Tensor, rope: RopeTable, attention: AttentionFn) -> Tensor:
        heads = (self.num_heads, -1)
        q = rotate(self.norm_q(self.q(x_BLC)).unflatten(-1, heads), rope)
        k = rotate(self.norm_k(self.k(x_BLC)).unflatten(-1, heads), rope)
        v = self.v(x_BLC).unflatten(-1, heads)
        out: Tensor = self.o(attention(q, k, v).flatten(-2))
        return out


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text; keys and values are made once by `keys_values`."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def keys_values(self, text_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, D) of the embedded text, the same in all steps and windows."""
        heads = (self.num_heads, -1)
        return (
            self.norm_k(self.k(text_BSC)).unflatten(-1, heads),
            self.v(text_BSC).unflatten(-1, heads),
        )

    def forward(self, x_BLC: Tensor, text: tuple[Tensor, Tensor], attention: AttentionFn) -> Tensor:
        q = self.norm_q(self.q(x_BLC)).unflatten(-1, (self.num_heads, -1))
        out: Tensor = self.o(attention(q, *text).flatten(-2))
        return out


class Block(nn.Module):
    """Audio add, modulated self-attention, cross-attention, modulated feed-forward.

    text_attention: the attention to the text; None uses `attention`.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        rope: RopeTable,
        text: tuple[Tensor, Tensor],
        audio_BTC: Tensor | None,
        attention: AttentionFn,
        text_attention: AttentionFn | None = None,
    ) -> Tensor:
        if audio_BTC is not None:
            x_BLC = add_per_frame(x_BLC, audio_BTC)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            self.modulation.float() + modulation_B6C.float()
        ).chunk(6, dim=1)
        attended = self.self_attn(modulate(x_BLC, shift_a, scale_a, self.eps), rope, attention)
        x_BLC = add_gated(x_BLC, attended, gate_a)
        x_BLC = x_BLC + self.cross_attn(self._norm3(x_BLC), text, text_attention or attention)
        fed = self.ffn(modulate(x_BLC, shift_f, scale_f, self.eps))
        return add_gated(x_BLC, fed, gate_f)

    def _norm3(self, x: Tensor) -> Tensor:
        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """`x + update * gate` in float32, returned in the dtype of x."""
    return torch.addcmul(x.float(), update.float(), gate).to(x.dtype)


def add_per_frame(x_BLC: Tensor, frame_BTC: Tensor) -> Tensor:
    """Tokens plus the vector of their latent frame, as a broadcast."""
    frames = frame_BTC.shape[1]
    per_frame = x_BLC.unflatten(1, (frames, -1))
    return (per_frame + frame_BTC[:, :, None, :].to(x_BLC.dtype)).flatten(1, 2)
