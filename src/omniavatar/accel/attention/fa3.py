"""FlashAttention-3 (package `fa3-fwd`, Hopper GPUs), in bf16 and in float8.

The float8 form rounds q, k and v to e4m3. Rotated q and k come from an RMS norm, so their values are of order
one and are cast without a scale (saturating at 448); v gets one scale for each head. Keys shorter than 1,024
(the text) stay in bf16, which costs no time. Relative error of one attention: about 3 %.
Source: FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omniavatar.accel.kernels.rows import FP8, FP8_MAX, FusedOps

SHORT_KEYS = 1024


class Fa3Attention:
    """An `AttentionFn` on FlashAttention-3 in bf16, the only precision that the package is built for."""

    def __init__(self) -> None:
        from fa3_fwd_interface import flash_attn_func

        self._flash: Callable[..., Any] = flash_attn_func

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        return _output(self._flash(q_BLHD, k_BSHD, v_BSHD))


class Fa3Float8Attention(Fa3Attention):
    """Self-attention in float8; q and k may be float8 already."""

    takes_float8 = True

    def __init__(self, ops: FusedOps) -> None:
        super().__init__()
        self._ops = ops

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        if k_BSHD.shape[1] < SHORT_KEYS and q_BLHD.dtype != FP8:
            return super().__call__(q_BLHD, k_BSHD, v_BSHD)
        v, v_scale = self._ops.quantize_heads(v_BSHD)
        one = torch.ones_like(v_scale)
        return _output(
            self._flash(
                _saturated(q_BLHD), _saturated(k_BSHD), v, q_descale=one, k_descale=one, v_descale=v_scale
            )
        )


def _saturated(x: Tensor) -> Tensor:
    return x if x.dtype == FP8 else x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output alone; some builds also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result
