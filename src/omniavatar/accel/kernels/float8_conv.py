"""Causal 3x3x3 convolutions of channels-last float8 frames, with bias, residual, norm and SiLU in their end.

Weights are rounded to e4m3 with one scale for each output channel. The input is the norm and SiLU of earlier
layers: a norm bounds its result by sqrt(C) times its largest gain, so one fixed power of two (`input_gain`)
uses float8's range and nothing is ever cut off or measured at run time. Sums are float32.
`convolve` is the slow equivalent, in plain PyTorch, of `float8_conv_cuda.convolve`, and defines the result.

Shapes: T frames, H W pixels, C channels in, N channels out. The window (T + 2, H, W, C) holds two past frames
before the new ones; with `border`, it has a further row of a neighbour above and below. With
`Float8Conv.padded`, it has a column of zeros on either side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from omniavatar.accel.kernels.rows import FP8, FP8_MAX
from omniavatar.model.conv3d import conv3d

CHANNEL_MULTIPLE = 16
"""Channels that a float8 convolution takes and gives are multiples of this."""


@dataclass(frozen=True, eq=False)
class Float8Conv:
    """The weights of one convolution.

    - rows: as the kernel reads them, float8, see `kernel_rows`. inputs, outputs: C and N.
    - scale: (N,) float32, of the sums, that of the input included. bias: (N,) float32.
    - gain: what the input was multiplied by.
    - padded: the window has a column of zeros on either side; see `kernel_rows`.
    """

    rows: Tensor
    inputs: int
    outputs: int
    scale: Tensor
    bias: Tensor
    gain: float
    padded: bool

    def weight(self) -> Tensor:
        """(N, C, 3, 3, 3) float8, from the rows."""
        data = self.rows.view(torch.uint8)
        if self.padded:
            taps = data.view(3, 3, self.outputs, 3, self.inputs).permute(2, 4, 0, 1, 3)
        else:
            taps = data.view(3, 3, 3, self.outputs, self.inputs).permute(3, 4, 0, 1, 2)
        order = _row_order(self.outputs).to(data.device)
        return (
            torch.empty_like(taps, memory_format=torch.contiguous_format)
            .index_copy_(0, order, taps)
            .view(FP8)
        )


@dataclass(frozen=True, eq=False)
class NormTo:
    """Norm and SiLU of the sum, as the input of the next convolution.

    - gamma: (N,) float32.
    - out: the new frames of its window, (T, H, W, N) float8, perhaps part of wider rows.
    - gain: what they are multiplied by.
    """

    gamma: Tensor
    out: Tensor
    gain: float


class Convolve(Protocol):
    """Signature of both implementations. `total`, `norm` or both are given.

    Writes convolution + bias + residual to `total` (T, H, W, N), which may be `residual`, and its norm where
    `norm` says. `joins_norm` says whether a convolution can do the latter.
    """

    def __call__(
        self,
        window: Tensor,
        conv: Float8Conv,
        residual: Tensor | None,
        *,
        border: bool,
        total: Tensor | None,
        norm: NormTo | None,
    ) -> None: ...


def takes_float8(inputs: int, outputs: int) -> bool:
    """Whether a 3x3x3 convolution of these channels can be a float8 one."""
    return inputs % CHANNEL_MULTIPLE == 0 and outputs % CHANNEL_MULTIPLE == 0


def input_gain(gamma: Tensor) -> float:
    """The largest power of two by which norm and SiLU stay within float8; gamma: (C,)."""
    bound = math.sqrt(gamma.numel()) * float(gamma.abs().max())
    return 2.0 ** math.floor(math.log2(FP8_MAX / bound)) if bound > 0 else 1.0


def quantise_conv(weight: Tensor, bias: Tensor, gain: float, padded: bool) -> Float8Conv:
    """A convolution (N, C, 3, 3, 3) whose input is multiplied by `gain`, a power of two."""
    wide = weight.detach().float()
    scale = (wide.abs().amax((1, 2, 3, 4)) / FP8_MAX).clamp_min(1e-12)
    rounded = (wide / scale.view(-1, 1, 1, 1, 1)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    outputs, inputs = weight.shape[:2]
    rows = kernel_rows(rounded, padded)
    return Float8Conv(rows, inputs, outputs, scale / gain, bias.detach().float(), gain, padded)


def halves(outputs: int) -> tuple[int, int]:
    """Output channels of a program's two accumulators; the second may have none."""
    if outputs % 192 == 0:
        return 128, 64
    if outputs == 96:
        return 64, 32
    return min(128, outputs & -outputs), 0


def joins_norm(outputs: int) -> bool:
    """Whether a program has all output channels, so that it can take the norm over them."""
    return sum(halves(outputs)) == outputs


def kernel_rows(weight: Tensor, padded: bool) -> Tensor:
    """Weights as the kernel reads them: a row for each tap and output channel, (27N, C).

    Within an accumulator of n channels, row 8i + 2q + e is channel q n/4 + 2i + e: a thread of the tensor
    cores holds columns 2q and 2q + 1 of every eight, so it holds a run of n/4 channels.
    padded: the three taps of a picture row are one run of 3C numbers in memory, (9N, 3C).
    """
    outputs, inputs = weight.shape[:2]
    data = weight.view(torch.uint8)[_row_order(outputs).to(weight.device)]
    axes = (2, 3, 0, 4, 1) if padded else (2, 3, 4, 0, 1)
    return data.permute(axes).reshape(-1, 3 * inputs if padded else inputs).contiguous().view(weight.dtype)


def _row_order(outputs: int) -> Tensor:
    """The output channel of each row of a tap."""
    parts = [part for part in halves(outputs) if part]
    spread = [torch.arange(part).view(4, -1, 2).transpose(0, 1).flatten() for part in parts]
    block = torch.cat([spread[0], *(parts[0] + each for each in spread[1:])])
    return (torch.arange(0, outputs, len(block)).view(-1, 1) + block).flatten()


def convolve(
    window: Tensor,
    conv: Float8Conv,
    residual: Tensor | None,
    *,
    border: bool,
    total: Tensor | None,
    norm: NormTo | None,
) -> None:
    """See `Convolve`; frame by frame, so that the intermediate results stay small."""
    weight = conv.weight().float()
    padding = (0, int(not border), int(not conv.padded))
    for number in range(len(window) - 2):
        taps = window[number : number + 3].float().permute(3, 0, 1, 2)[None]
        sums = conv3d(taps, weight, None, (1, 1, 1), padding)[0, :, 0].permute(1, 2, 0)
        value = sums * conv.scale + conv.bias
        if residual is not None:
            value = value + residual[number].float()
        if total is not None:
            total[number].copy_(value)
        if norm is not None:
            length = torch.linalg.vecdot(value, value).sqrt_().clamp_min_(1e-12)
            normed = value * (value.shape[-1] ** 0.5 / length)[..., None] * norm.gamma
            norm.out[number].copy_((F.silu(normed) * norm.gain).to(FP8))
