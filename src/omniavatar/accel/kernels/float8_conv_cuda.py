"""`float8_conv.convolve` for Hopper GPUs: cuts the work into tiles and starts `float8_conv_gluon`.

The file needs triton: import it only for CUDA.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from omniavatar.accel.kernels.float8_conv import Float8Conv, NormTo, halves, joins_norm
from omniavatar.accel.kernels.float8_conv_gluon import (
    HALF_PIXELS,
    HIGH,
    NORM,
    PIXELS,
    RESIDUAL,
    TOTAL,
    WIDE,
    conv_kernel,
)

SHARED_BYTES = 224 * 1024
MOST_STAGES = 6
SUMS, NORMED_SUMS = 192, 96
"""Registers of a thread for sums, without and with the norm after them. More frames save fetches, fewer leave
registers for the norm: 96 channels with residual and norm take 1.65 ms in two frames and 2.55 in four."""


@dataclass(frozen=True)
class Tiling:
    """How a convolution is cut. frames: of a program. inner: numbers of the inner axis a stage. stages: of
    the ring."""

    frames: int
    inner: int
    stages: int


def tiling(conv: Float8Conv, frames: int) -> Tiling:
    """The tiling of a convolution over a number of new frames, the same with and without a norm."""
    first, second = halves(conv.outputs)
    registers = NORMED_SUMS if joins_norm(conv.outputs) else SUMS
    most = max(1, min(4, 2 * registers // (first + second)))
    frames = 1 << (min(most, frames).bit_length() - 1)
    run = 3 * conv.inputs if conv.padded else conv.inputs
    inner = 64 if run > 32 and (run % 64 == 0 or conv.padded) else 32
    stage = ((frames + 2) * PIXELS.value + 3 * (first + second)) * inner
    return Tiling(frames, inner, min(MOST_STAGES, SHARED_BYTES // stage))


def convolve(
    window: Tensor,
    conv: Float8Conv,
    residual: Tensor | None,
    *,
    border: bool,
    total: Tensor | None,
    norm: NormTo | None,
    cut: Tiling | None = None,
) -> None:
    """See `float8_conv.Convolve`. cut: another tiling than `tiling` chooses."""
    frames, height, width = len(window) - 2, window.shape[1] - 2 * border, window.shape[2] - 2 * conv.padded
    channels, (first, second) = conv.outputs, halves(conv.outputs)
    shape = (frames, height, width, channels)
    for name, tensor in (("residual", residual), ("total", total)):
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(f"convolve: {name} is not contiguous with shape {shape}")
    if norm is not None and (norm.out.shape != shape or not norm.out[0, 0].is_contiguous()):
        raise ValueError(f"convolve: out has not the shape {shape}, or no contiguous rows")
    if not window.is_contiguous() or window.shape[3] != conv.inputs:
        raise ValueError(f"convolve: the window is not contiguous with {conv.inputs} channels")
    cut = cut or tiling(conv, frames)
    if norm is not None and first + second != channels:
        raise ValueError(f"convolve: a norm over {channels} channels does not fit a program")
    if conv.padded:  # the three taps of a row are one run of 3C numbers, a pixel apart
        run, strides = 3 * conv.inputs, window.stride()
        window = window.as_strided((*window.shape[:2], width, run), strides)
    else:
        run = conv.inputs
    box, flat = _layouts(cut.inner)
    tiles = -(-frames // cut.frames) * -(-height // HIGH.value) * -(-width // WIDE.value)
    blocks = channels // (first + second)
    tiles *= blocks
    parts = int(residual is not None) * RESIDUAL.value + int(total is not None) * TOTAL.value
    parts += int(norm is not None) * NORM.value
    given = [each for each in (total, residual) if each is not None]
    anything = given[0] if given else _nothing(window.device)
    with torch.cuda.device_of(window):
        conv_kernel[(min(tiles, _processors(window.device)),)](
            TensorDescriptor.from_tensor(window, [1, HIGH.value, WIDE.value, cut.inner], box),
            TensorDescriptor.from_tensor(conv.rows, [first, cut.inner], flat),
            TensorDescriptor.from_tensor(conv.rows, [second or first, cut.inner], flat),
            conv.scale,
            conv.bias,
            anything if residual is None else residual,
            anything if total is None else total,
            conv.scale if norm is None else norm.gamma,
            window if norm is None else norm.out,
            frames,
            height,
            width,
            channels,
            blocks,
            tiles,
            int(not border),
            int(not conv.padded),
            0 if norm is None else norm.out.stride(0),
            0 if norm is None else norm.out.stride(1),
            1.0 if norm is None else norm.gain,
            parts,
            -(-run // cut.inner),
            TT=cut.frames,
            TAPS=1 if conv.padded else 3,
            NA=first,
            NB=second,
            LINES_A=_lines(first),
            LINES_B=_lines(second or first),
            STAGES=cut.stages,
            num_warps=4,
        )


@functools.cache
def _layouts(inner: int) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """Shared memory of a box of pixels and of a block of weights."""
    kinds = [gl.NVMMASharedLayout(swizzle_byte_width=inner, element_bitwidth=8, rank=rank) for rank in (4, 2)]
    return kinds[0], kinds[1]


@functools.cache
def _lines(columns: int) -> gl.DistributedLinearLayout:
    """A thread holds `columns` / 4 neighbouring channels of two pixels, which lie 8 rows apart."""
    registers = [[0, 1 << bit] for bit in range((columns // 4).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [*registers, [8, 0]],
        [[0, columns // 4], [0, columns // 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [HALF_PIXELS.value, columns],
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """Stands in for a residual and a total that a call does not have."""
    return torch.empty(16, dtype=torch.bfloat16, device=device)
