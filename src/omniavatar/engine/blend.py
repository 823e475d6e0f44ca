"""A window begins as the picture shown last, and becomes its own over some frames.

The last given frame of a window was shown already, by the window before. Its picture here has been through
the VAE once more and has no frames before it, so the two differ, and the difference would come in one frame.
It is added to the first new frames instead, less and less. Where the picture stands still, the difference of
the first new frame to the frame before it is treated alike: there the model changes light and sharpness only.

Frames that are handed over are never changed, so the following windows are the same with any setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

STANDS = 1.0 / 255.0
"""Mean change around a pixel, of 1, at which it counts as standing still by the factor 1/e."""
AROUND = 9
"""Rows and columns of that mean."""


def bytes_of(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8, rounded; what `to_unit` reads."""
    return (pixels * 255.0).round_().to(torch.uint8).contiguous()


def to_unit(shown: Tensor, device: torch.device) -> Tensor:
    """Pixels in [0, 1] float32 on `device` of uint8."""
    return shown.to(device).float() / 255.0


def standing(change: Tensor) -> Tensor:
    """How much each pixel stands still, (1, 1, 1, H, W) from 0 to 1, by a change (1, 3, 1, H, W)."""
    size = change.abs().mean(dim=(1, 2))[:, None]
    mean = avg_pool2d(size, AROUND, 1, AROUND // 2, count_include_pad=False)
    return torch.exp(-((mean / STANDS) ** 2))[:, :, None]


@dataclass(eq=False)
class SeamBlend:
    """Changes the first new frames of one window.

    - shown: the picture shown last, (1, 3, 1, H, W) in [0, 1].
    - first: number of the window's first new frame, at least 1.
    - frames: how many new frames are changed.
    """

    shown: Tensor
    first: int
    frames: int
    _before: Tensor | None = field(default=None, init=False)
    _difference: Tensor | None = field(default=None, init=False)

    def apply(self, pixels: Tensor, done: int) -> None:
        """Change frames (1, 3, n, H, W) in [0, 1] in place; they are the window's from number `done` on.

        All frames of the window from number `first` - 1 on must come, in order.
        """
        count, first = pixels.shape[2], self.first - done
        if 0 < first <= count:
            self._before = pixels[:, :, first - 1 : first].clone()
        if 0 <= first < count and self._before is not None:
            step = self._before - pixels[:, :, first : first + 1]
            self._difference = self.shown - self._before + standing(step) * step
        low, high = max(first, 0), min(first + self.frames, count)
        if low >= high or self._difference is None:
            return
        number = torch.arange(low, high, device=pixels.device, dtype=torch.float32) + (1 - first)
        weight = 1.0 - number / (self.frames + 1)
        pixels[:, :, low:high].add_(self._difference * weight[:, None, None]).clamp_(0.0, 1.0)
