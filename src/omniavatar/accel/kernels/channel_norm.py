"""Sum, channel RMS norm and SiLU of channels-last frames in one call: all the work between two convolutions.

`value + bias + residual` is summed in float32 and written to `total` if that is given. The sum is divided by
its root mean square over the channels, scaled by `gamma`, passed through SiLU and written to `out`, the slice
of the next convolution's input behind the past frames. Plain layers round to the working precision after each
of these steps; here the result is rounded once. This is the slow equivalent, in plain PyTorch, of
`channel_norm_triton`.

Shapes: T frames, H W pixels, C channels; frames are (T, H, W, C), contiguous; `out` may be part of wider
rows. `out` must not share memory with another argument; `total` may be `value` or `residual`. With `phases`,
`value` is the result of a convolution with `phase_weight`, (T, H/2 + 1, W/2 + 1, 4C): pixel (2i+p, 2j+q) is
phase 2p+q at (i+p, j+q).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class AddNorm(Protocol):
    """Signature of both implementations; `gamma` and `out` are both given or both None."""

    def __call__(
        self,
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
    ) -> None: ...


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
    """Write value + bias + residual to `total` and its norm (then SiLU if `activate`) to `out`.

    gain: multiplies what goes to `out`, for float8.

    It works frame by frame, so that the intermediate results stay in a CPU's caches.
    """
    for number, frame in enumerate(merge_phases(value) if phases else value):
        added = frame.float()
        if bias is not None:
            added = added + bias.float()
        if residual is not None:
            added = added + residual[number].float()
        if total is not None:
            total[number].copy_(added)
        if out is not None and gamma is not None:
            length = torch.linalg.vecdot(added, added).sqrt_().clamp_min_(1e-12)
            normed = added * (added.shape[-1] ** 0.5 / length)[..., None]
            normed *= gamma.flatten().float()
            normed = F.silu(normed, inplace=True) if activate else normed
            out[number].copy_(normed if gain == 1 else normed * gain)


def phase_weight(weight: Tensor) -> Tensor:
    """One 2x2 convolution (4O, C, 2, 2), padding 1, for a 3x3 one (O, C, 3, 3) after nearest doubling.

    Doubling repeats pixels, so two of the three taps along an axis always meet the same pixel: their weights
    are added in float32. Four output phases of 2x2 taps replace 3x3 taps at four times the pixels. That takes
    4/9 of the products, and the doubled frames are never written. It loses one more rounding of the sums in
    bf16.
    """
    first, second, third = weight.float().unbind(2)
    rows = (torch.stack([first, second + third], 2), torch.stack([first + second, third], 2))
    parts: list[Tensor] = []
    for row in rows:
        left, middle, right = row.unbind(3)
        parts.append(torch.stack([left, middle + right], 3))
        parts.append(torch.stack([left + middle, right], 3))
    return torch.cat(parts).to(weight.dtype)


def pair_weight(weight: Tensor) -> Tensor:
    """A 3x3x3 convolution as one over pairs of neighbouring columns: (O, C, 3, 3, 3) -> (2O, 2C, 3, 3, 2).

    Rows have one column of zeros on either side. Then pixels 2i and 2i+1 of the result need columns 2i to
    2i+3: the pairs i and i+1. The memory layout is unchanged: a pair of columns is 2C channels side by side.
    A quarter of the products are with zeros, but for 96 channels cuDNN's kernels for 192 are 1.7 times as
    fast (H100).
    """
    outputs, inputs, *kernel = weight.shape
    wide = weight.new_zeros(2, outputs, 2, inputs, *kernel[:2], 2)
    for to in range(2):
        for tap in range(3):
            pair, half = divmod(to + tap, 2)
            wide[to, :, half, :, :, :, pair] = weight[..., tap]
    return wide.reshape(2 * outputs, 2 * inputs, *kernel[:2], 2)


def merge_phases(value: Tensor) -> Tensor:
    """The four phases (T, h+1, w+1, 4C) as frames (T, 2h, 2w, C)."""
    frames, rows, columns, channels = value.shape
    height, width = rows - 1, columns - 1
    out = value.new_empty(frames, height, 2, width, 2, channels // 4)
    for phase, part in enumerate(value.chunk(4, dim=-1)):
        p, q = divmod(phase, 2)
        out[:, :, p, :, q] = part[:, p : p + height, q : q + width]
    return out.view(frames, 2 * height, 2 * width, channels // 4)
