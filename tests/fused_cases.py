"""Compares implementations of `accel.kernels` with the eager ones on the same inputs."""

from __future__ import annotations

import torch

from omniavatar.accel.kernels.rows import FP8, EagerOps, QuantRows, quantize_rows
from omniavatar.accel.kernels.scaled import rescale


def rows(value) -> torch.Tensor:
    return value.dequantize() if isinstance(value, QuantRows) else value.float()


def compare(
    fast, device: str, dtype: torch.dtype, width: int, heads: int, tolerance: float, fp8_tolerance: float
) -> None:
    """Compare every pass of `fast` with `EagerOps`."""
    slow = EagerOps(fast.row_dtype)
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int, kind: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, kind)

    batch, frames, per_frame = 2, 3, 5
    tokens = frames * per_frame
    x, update = random(batch, tokens, width), random(batch, tokens, width)
    gate, scale, shift = (random(batch, 1, width, kind=torch.float32) for _ in range(3))
    affine = random(width, kind=torch.float32), random(width, kind=torch.float32)
    frame = random(batch, frames, width)

    def close(a, b, limit: float = tolerance) -> None:
        a, b = rows(a).cpu(), rows(b).cpu()
        assert a.shape == b.shape
        error = ((a - b).norm() / b.norm()).item()
        assert error <= limit, error

    options = [
        {},
        {"update_BLC": update},
        {"update_BLC": update, "gate": gate},
        {"frame_BTC": frame},
        {"update_BLC": update, "gate": gate, "frame_BTC": frame},
    ]
    for quantize in (False, True):
        for vectors in ((scale, shift), affine):
            for option in options:
                a = fast.norm(x, *vectors, 1e-6, quantize=quantize, **option)
                b = slow.norm(x, *vectors, 1e-6, quantize=quantize, **option)
                close(a[0], b[0])
                close(a[1], b[1], fp8_tolerance if quantize else tolerance)
                assert isinstance(a[1], QuantRows) is quantize
    close(fast.add_gated(x, update, gate), slow.add_gated(x, update, gate))

    packed = random(batch, tokens, 3 * width)
    strided = packed[..., width : 2 * width]
    weight = random(width, kind=torch.float32) + 1
    close(fast.rms(strided, weight, 1e-6), slow.rms(strided, weight, 1e-6))
    angles = torch.rand(tokens, width // heads // 2, generator=generator).to(device) * 6
    for kind in (dtype, FP8):
        a = fast.rms_rotate(strided, weight, 1e-6, angles.cos(), angles.sin(), heads, kind)
        b = slow.rms_rotate(strided, weight, 1e-6, angles.cos(), angles.sin(), heads, kind)
        assert a.dtype == kind and a.is_contiguous()
        close(a, b, fp8_tolerance if kind == FP8 else tolerance)
    wide, bias = random(2 * width, width) / width**0.5, random(2 * width)
    close(fast.linear_gelu(x, wide, bias), slow.linear_gelu(x, wide, bias))
    for gelu in (False, True):
        close(fast.quantize(x, gelu=gelu), slow.quantize(x, gelu=gelu), fp8_tolerance)
    values = strided.unflatten(-1, (heads, -1))
    a, b = fast.quantize_heads(values), slow.quantize_heads(values)
    close(a[1], b[1])
    close(a[0], b[0], fp8_tolerance)


def compare_rescale(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the pass after an integer product with the same in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = quantize_rows(torch.randn(37, 64, generator=generator), torch.int8)
    weight = quantize_rows(torch.randn(1100, 64, generator=generator), torch.int8)
    bias = torch.randn(1100, generator=generator)
    sums = (rows.data.int() @ weight.data.int().t()).to(device)
    for added in (None, bias.to(device, dtype)):
        out = rescale(sums, rows.scale.to(device), weight.scale.to(device), added, dtype).double().cpu()
        exact = rows.dequantize().double() @ weight.dequantize().double().t()
        exact = exact if added is None else exact + added.double().cpu()
        assert ((out - exact).norm() / exact.norm()).item() <= tolerance
