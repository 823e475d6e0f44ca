"""`rows` on CUDA: the Triton kernels of `fused_kernels` behind `FusedOps`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from omniavatar.accel.kernels.fused_kernels import (
    add_gated_kernel,
    norm_kernel,
    quantize_heads_kernel,
    quantize_kernel,
    rms_kernel,
    rms_rotate_kernel,
)
from omniavatar.accel.kernels.rows import FP8, FP8_MAX, ROW_LIMITS, QuantRows, Rows, head_scales

GELU_IN_PRODUCT_WIDTH = 2048
"""Up to this input width a product that ends in GELU is faster than two passes (H100: 1.22 ms against 1.50
for 1536 to 8960 channels, 6.01 against 5.93 for 5120 to 13824)."""


class TritonOps:
    """`FusedOps` for CUDA tensors whose head width is a power of two.

    values_per_warp: a row's program has (row width / values_per_warp) warps, 1 to 16.
    """

    def __init__(self, values_per_warp: int = 1024, row_dtype: torch.dtype = FP8) -> None:
        self._values_per_warp = values_per_warp
        self.row_dtype = row_dtype

    def _warps(self, block: int) -> int:
        return max(1, min(16, block // self._values_per_warp))

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
        batch, tokens, width = x_BLC.shape
        adds = update_BLC is not None or frame_BTC is not None
        total = torch.empty_like(x_BLC) if adds else x_BLC
        out = torch.empty_like(x_BLC, dtype=self.row_dtype if quantize else x_BLC.dtype)
        row_scale = x_BLC.new_empty(batch, tokens, 1, dtype=torch.float32) if quantize else scale
        frames = 1 if frame_BTC is None else frame_BTC.shape[1]
        main, rest = _parts(width)
        norm_kernel[(batch * tokens,)](
            x_BLC.contiguous(),
            x_BLC if update_BLC is None else update_BLC.contiguous(),
            scale if gate is None else gate,
            scale if frame_BTC is None else frame_BTC.contiguous(),
            scale,
            shift,
            total,
            out,
            row_scale,
            width,
            tokens,
            tokens // frames,
            0 if gate is None else _batch_step(gate, width),
            _batch_step(scale, width),
            eps,
            HAS_UPDATE=update_BLC is not None,
            HAS_GATE=gate is not None,
            HAS_FRAME=frame_BTC is not None,
            QUANTIZE=quantize,
            LIMIT=ROW_LIMITS[self.row_dtype],
            WHOLE=self.row_dtype == torch.int8,
            MAIN=main,
            REST=rest,
            num_warps=self._warps(main),
        )
        return total, QuantRows(out, row_scale) if quantize else out

    def add_gated(self, x_BLC: Tensor, update_BLC: Tensor, gate: Tensor) -> Tensor:
        batch, tokens, width = x_BLC.shape
        out = torch.empty_like(x_BLC)
        block = triton.next_power_of_2(width)
        add_gated_kernel[(batch * tokens,)](
            x_BLC.contiguous(),
            update_BLC.contiguous(),
            gate,
            out,
            width,
            tokens,
            _batch_step(gate, width),
            BLOCK=block,
            num_warps=self._warps(block),
        )
        return out

    def rms(self, x_BLC: Tensor, weight: Tensor, eps: float) -> Tensor:
        batch, tokens, width = x_BLC.shape
        out = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
        main, rest = _parts(width)
        rms_kernel[(batch * tokens,)](
            _packed_rows(x_BLC),
            weight,
            out,
            width,
            x_BLC.stride(1),
            x_BLC.stride(0),
            tokens,
            eps,
            MAIN=main,
            REST=rest,
            num_warps=self._warps(main),
        )
        return out

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
        batch, tokens, width = x_BLC.shape
        head_dim = width // heads
        out = torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device=x_BLC.device)
        main, rest = _parts(heads)
        rms_rotate_kernel[(batch * tokens,)](
            _packed_rows(x_BLC),
            weight,
            cos,
            sin,
            out,
            heads,
            x_BLC.stride(1),
            x_BLC.stride(0),
            tokens,
            eps,
            HEAD_DIM=head_dim,
            CLAMP=dtype == FP8,
            FP8_LIMIT=FP8_MAX,
            MAIN=main,
            REST=rest,
            num_warps=self._warps(main * head_dim),
        )
        return out

    def linear_gelu(self, x_BLC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x_BLC.shape[-1] > GELU_IN_PRODUCT_WIDTH or x_BLC.device.type != "cuda":
            return torch.ops.aten.gelu_(F.linear(x_BLC, weight, bias), approximate="tanh")
        rows = torch._addmm_activation(bias, x_BLC.flatten(0, -2), weight.t(), use_gelu=True)
        return rows.unflatten(0, x_BLC.shape[:-1])

    def quantize(self, x_BLC: Tensor, *, gelu: bool = False) -> QuantRows:
        x = x_BLC.contiguous()
        width = x.shape[-1]
        out = torch.empty_like(x, dtype=self.row_dtype)
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        main, rest = _parts(width)
        quantize_kernel[(scale.numel(),)](
            x,
            out,
            scale,
            width,
            GELU=gelu,
            LIMIT=ROW_LIMITS[self.row_dtype],
            WHOLE=self.row_dtype == torch.int8,
            MAIN=main,
            REST=rest,
            num_warps=self._warps(main),
        )
        return QuantRows(out, scale)

    def quantize_heads(self, x_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, head_dim = x_BLHD.shape
        scales = head_scales(x_BLHD)
        out = torch.empty(x_BLHD.shape, dtype=FP8, device=x_BLHD.device)
        block = triton.next_power_of_2(heads * head_dim)
        quantize_heads_kernel[(batch * tokens,)](
            _packed_rows(x_BLHD.flatten(2)),
            scales,
            out,
            heads * head_dim,
            x_BLHD.stride(1),
            x_BLHD.stride(0),
            tokens,
            heads,
            HEAD_DIM=head_dim,
            FP8_LIMIT=FP8_MAX,
            BLOCK=block,
            num_warps=self._warps(block),
        )
        return out, scales


def _parts(size: int) -> tuple[int, int]:
    """Two powers of two that cover `size`: the largest one not above it, and one for the rest or 0."""
    main = 1 << (size.bit_length() - 1)
    return main, triton.next_power_of_2(size - main) if size > main else 0


def _batch_step(vector: Tensor, width: int) -> int:
    """Distance between the rows of two batch entries; 0 for a vector (C,) that all of them use."""
    if vector.dtype != torch.float32 or vector.shape[-1] != width or not vector.is_contiguous():
        raise ValueError(
            f"row vectors must be contiguous float32 of width {width}, not {vector.dtype} {vector.shape}"
        )
    return width if vector.ndim == 3 and vector.shape[0] > 1 else 0


def _packed_rows(x: Tensor) -> Tensor:
    if x.stride(-1) != 1:
        raise ValueError("the channels of a row must be contiguous")
    return x
