"""`channel_norm.add_norm` as one Triton kernel: each number is read once and written once.

`out` may be part of wider rows (frames inside a border). A program takes some pixels with all their channels;
the channel axis is padded to a power of two and masked. Sums, norm and SiLU are float32. The file needs
triton: import it only for CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096


def add_norm(
    value: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    total: Tensor | None,
    gamma: Tensor | None,
    out: Tensor | None,
    activate: bool,
    phases: bool,
    gain: float = 1.0,
) -> None:
    """Write value + bias + residual to `total`, and `gain` times its norm (SiLU if `activate`) to `out`."""
    target = out if out is not None else total
    if target is None:
        raise ValueError("add_norm: total or out must be given")
    if (gamma is None) != (out is None):
        raise ValueError("add_norm: gamma and out must be given together")
    frames, height, width, channels = target.shape
    source = (frames, height // 2 + 1, width // 2 + 1, 4 * channels) if phases else target.shape
    shapes = {"value": (value, source), "residual": (residual, target.shape), "total": (total, target.shape)}
    for name, (tensor, shape) in (*shapes.items(), ("out", (out, target.shape))):
        if tensor is None:
            continue
        rows = tensor.is_contiguous() or (tensor is out and tensor[0, 0].is_contiguous())
        if tensor.shape != shape or not rows:
            raise ValueError(f"add_norm: {name} is not contiguous with shape {tuple(shape)}")
    pixels = frames * height * width
    padded = triton.next_power_of_2(channels)
    block = max(_TILE // padded, 1)
    with torch.cuda.device_of(value):
        _add_norm_kernel[(triton.cdiv(pixels, block),)](
            value,
            bias,
            residual,
            total,
            gamma,
            out,
            pixels,
            height,
            width,
            width if out is None else out.stride(1) // channels,
            height * width if out is None else out.stride(0) // channels,
            C=channels,
            BLOCK_C=padded,
            BLOCK_P=block,
            ACTIVATE=activate,
            PHASES=phases,
            WHOLE=out is None or out.is_contiguous(),
            GAIN=gain,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["pixels", "height", "width", "row_pixels", "frame_pixels"])
def _add_norm_kernel(
    value,
    bias,
    residual,
    total,
    gamma,
    out,
    pixels,
    height,
    width,
    row_pixels,
    frame_pixels,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PHASES: tl.constexpr,
    WHOLE: tl.constexpr,
    GAIN: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    real = channel < C
    inside = (pixel < pixels)[:, None] & real[None, :]
    place = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    if PHASES:
        frame = pixel // (height * width)
        y = pixel // width % height
        x = pixel % width
        source = (frame * (height // 2 + 1) + y // 2 + y % 2) * (width // 2 + 1) + x // 2 + x % 2
        source = source.to(tl.int64) * 4 + (y % 2 * 2 + x % 2)
        added = tl.load(value + source[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        added = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        added += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        added += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + place, added.to(total.dtype.element_ty), mask=inside)
    if out is not None:
        scale = C**0.5
        length = tl.maximum(tl.sqrt(tl.sum(added * added, axis=1)), 1e-12)
        gain = tl.load(gamma + channel, mask=real, other=0.0).to(tl.float32)
        normed = added / length[:, None] * scale * gain[None, :]
        if ACTIVATE:
            normed = normed * tl.sigmoid(normed)
        if GAIN != 1:
            normed = normed * GAIN
        if not WHOLE:
            target = pixel // (height * width) * frame_pixels + pixel // width % height * row_pixels
            target = (target + pixel % width).to(tl.int64)
            place = target[:, None] * C + channel[None, :]
        tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)
