"""Float8 and int8 matrix products with a scale for each row of both sides.

`out = (x.data * x.scale) @ (weight * weight_scale).T + bias`.
- float8 on CUDA: PyTorch's scaled product with fast accumulation (compute capability 8.9 and later; about
  1,500 TFLOP/s on an H100, twice bf16).
- int8 on CUDA: PyTorch's integer product (8.0 and later; 929 TFLOP/s on an H100) and one pass that scales the
  sums.
- Otherwise, the slow equivalent: a product of dequantised float32 values.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from omniavatar.accel.kernels.rows import QuantRows

INT8_LEAST_ROWS = 32
"""`torch._int_mm` takes more than 16 rows."""


def scaled_linear(
    x: QuantRows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Product (.., N) in `dtype` of rows (.., K) and a weight (N, K) with scales (N, 1) float32."""
    if x.data.device.type != "cuda":
        return scaled_linear_eager(x, weight, weight_scale, bias, dtype)
    if weight.dtype == torch.int8:
        return _int8_linear(x, weight, weight_scale, bias, dtype)
    rows = x.data.flatten(0, -2)
    out: Tensor = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=x.scale.view(-1, 1),
        scale_b=weight_scale.view(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.unflatten(0, x.data.shape[:-1])


def scaled_linear_eager(
    x: QuantRows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The slow equivalent of `scaled_linear`, for any device."""
    wide = F.linear(x.dequantize(), weight.float() * weight_scale)
    return (wide if bias is None else wide + bias.float()).to(dtype)


def _int8_linear(
    x: QuantRows, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows = x.data.flatten(0, -2)
    short = max(INT8_LEAST_ROWS - len(rows), 0)
    sums = torch._int_mm(F.pad(rows, (0, 0, 0, short)) if short else rows, weight.t())[: len(rows)]
    return rescale(sums, x.scale, weight_scale, bias, dtype).unflatten(0, x.data.shape[:-1])


def rescale(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Integer sums (M, N) times the scales of both sides, plus the bias, in one Triton pass."""
    import triton

    from omniavatar.accel.kernels.fused_kernels import rescale_kernel

    rows, width = sums.shape
    out = torch.empty(rows, width, dtype=dtype, device=sums.device)
    block = min(1024, triton.next_power_of_2(width))
    rescale_kernel[(rows, triton.cdiv(width, block))](
        sums.contiguous(),
        row_scale,
        column_scale,
        sums if bias is None else bias,
        out,
        width,
        HAS_BIAS=bias is not None,
        BLOCK=block,
    )
    return out
