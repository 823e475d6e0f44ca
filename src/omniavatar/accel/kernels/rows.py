"""The element-wise parts of a transformer block, each as one pass over memory, behind one signature.

Two implementations: `EagerOps` (plain PyTorch, any device; the definition) and `fused_triton.TritonOps`
(CUDA). Everything is computed in float32 and rounded once when it is written. A residual that is stored and
normalised is normalised *as stored*. Rows may be quantised to float8 (e4m3) or int8 with one float32 scale
for each row: `value = data.float() * scale`.

Shapes: B batch, L tokens, C width, H heads, D head dim, T latent frames (L divides by T).
Row vectors (`gate`, `scale`, `shift`) are (B, 1, C) or (C,) float32; weights are (C,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True, eq=False)
class QuantRows:
    """Rows (.., C) in float8 or int8, and their float32 scales (.., 1)."""

    data: Tensor
    scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.data.float() * self.scale).to(dtype)


ROW_LIMITS = {FP8: FP8_MAX, torch.int8: 127.0}
Rows = Tensor | QuantRows
"""Input of a linear layer: rows in the residual's dtype, or quantised rows."""


class FusedOps(Protocol):
    """The passes of a block. `quantize=True` returns `QuantRows`, for a next linear layer that takes them.

    row_dtype: float8 or int8, the dtype that rows are quantised to.
    """

    row_dtype: torch.dtype

    def norm(
        self,
        x_BLC: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        update_BLC: Tensor | None = None,
        gate: Tensor | None = None,
        frame_BTC: Tensor | None = None,
        quantize: bool = False,
    ) -> tuple[Tensor, Rows]:
        """`x' = x + update * gate + frame`, and `layer_norm(x') * scale + shift`.

        x' has the dtype of x; it is x itself if nothing is added. frame is added to each token of its frame.
        """
        ...

    def add_gated(self, x_BLC: Tensor, update_BLC: Tensor, gate: Tensor) -> Tensor:
        """`x + update * gate` in the dtype of x."""
        ...

    def rms(self, x_BLC: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the full width times `weight`, contiguous, dtype of x. Rows of x may be strided."""
        ...

    def rms_rotate(
        self,
        x_BLC: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """RMS norm, then rotation of interleaved pairs by the tables (L, D/2); (B, L, H, D) in `dtype`."""
        ...

    def linear_gelu(self, x_BLC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`gelu(x @ weight.T + bias)` with the tanh GELU, (B, L, C) -> (B, L, O)."""
        ...

    def quantize(self, x_BLC: Tensor, *, gelu: bool = False) -> QuantRows:
        """Rows in `row_dtype`. gelu: apply a tanh GELU first."""
        ...

    def quantize_heads(self, x_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        """`x_BLHD` in float8, contiguous, and the scales of the heads (B, H) float32."""
        ...


def head_scales(x_BLHD: Tensor) -> Tensor:
    """Scales (B, H) that keep a head's values inside float8's range, from every 64th token.

    Float8 has 15 octaves above its subnormals, so the exact maximum is not needed. Four times the sampled
    maximum leaves a margin for the other tokens and costs no precision; larger values saturate.
    """
    largest = x_BLHD[:, ::64].abs().amax(dim=(1, 3)).float()
    return (largest * (4.0 / FP8_MAX)).clamp_min(1e-12)


class EagerOps:
    """`FusedOps` in plain PyTorch: slow, for any device."""

    def __init__(self, row_dtype: torch.dtype = FP8) -> None:
        self.row_dtype = row_dtype

    def norm(
        self,
        x_BLC: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        update_BLC: Tensor | None = None,
        gate: Tensor | None = None,
        frame_BTC: Tensor | None = None,
        quantize: bool = False,
    ) -> tuple[Tensor, Rows]:
        if update_BLC is not None or frame_BTC is not None:
            wide = x_BLC.float()
            if update_BLC is not None:
                update = update_BLC.float()
                wide = wide + (update if gate is None else update * gate)
            if frame_BTC is not None:
                per_frame = wide.unflatten(1, (frame_BTC.shape[1], -1)) + frame_BTC.float()[:, :, None]
                wide = per_frame.flatten(1, 2)
            x_BLC = wide.to(x_BLC.dtype)
        normed = F.layer_norm(x_BLC.float(), x_BLC.shape[-1:], eps=eps)
        rows = torch.addcmul(shift, normed, scale)
        return x_BLC, quantize_rows(rows, self.row_dtype) if quantize else rows.to(x_BLC.dtype)

    def add_gated(self, x_BLC: Tensor, update_BLC: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x_BLC.float(), update_BLC.float(), gate).to(x_BLC.dtype)

    def rms(self, x_BLC: Tensor, weight: Tensor, eps: float) -> Tensor:
        return _rms(x_BLC, weight, eps).to(x_BLC.dtype)

    def rms_rotate(
        self,
        x_BLC: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        dtype: torch.dtype,
    ) -> Tensor:
        even, odd = _rms(x_BLC, weight, eps).unflatten(-1, (heads, -1, 2)).unbind(-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        if dtype == FP8:
            turned = turned.clamp(-FP8_MAX, FP8_MAX)
        return turned.to(dtype)

    def linear_gelu(self, x_BLC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(F.linear(x_BLC, weight, bias), approximate="tanh")

    def quantize(self, x_BLC: Tensor, *, gelu: bool = False) -> QuantRows:
        wide = x_BLC.float()
        return quantize_rows(F.gelu(wide, approximate="tanh") if gelu else wide, self.row_dtype)

    def quantize_heads(self, x_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        scales = head_scales(x_BLHD)
        scaled = x_BLHD.float() / scales[:, None, :, None]
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8).contiguous(), scales


def quantize_rows(rows: Tensor, dtype: torch.dtype = FP8) -> QuantRows:
    """Float8 or int8 rows, scaled so that the largest value of each row is the type's maximum."""
    scale = (rows.abs().amax(-1, keepdim=True) / ROW_LIMITS[dtype]).clamp_min(1e-12)
    scaled = rows / scale
    return QuantRows((scaled if dtype == FP8 else (scaled + 0.5).floor()).to(dtype), scale)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
