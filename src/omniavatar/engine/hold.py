"""What stands still is shown as it was in the video's first frame.

A model paints a resting background a little differently in each window and each latent, so it flickers. Each
frame is compared with the first one, in cells of 1/24 of the picture's shorter side. A cell that differs
little takes its pixels from the first frame. Cells beside what moves do not, nor do cells that it separates
from the picture's border, such as cheeks between the eyes, the mouth and the outline. A cell that moved is
taken over slowly, so a face that rests for a moment is not held.

Frames are treated by latents: frame 0, then four at a time. A latent needs only the weights of the frame
before it, so windows and blocks are treated alike, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, max_pool2d

from omniavatar.engine.blend import bytes_of, to_unit

SIDE = 96
"""Points along the shorter side of the picture at which frames are compared: each is a mean."""
CELL = 4
"""Points of a cell along one axis."""
LET_GO = 4
"""Frames over which a cell is let go before it moves, as far as its latent reaches."""
LEAST = 2.0**-100
"""Least change at which a cell moves: half of it is not 0 in float32."""
TAKE_OVER = 100
"""Frames over which a cell that moved is taken over."""


def points(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the points at which a picture is compared; both are multiples of CELL."""
    short = min(height, width)
    rows, columns = (max(1, round(side * SIDE / short / CELL)) * CELL for side in (height, width))
    return rows, columns


def cells(height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the cells of a picture."""
    rows, columns = points(height, width)
    return rows // CELL, columns // CELL


def change(frames: Tensor, reference: Tensor) -> Tensor:
    """The largest change of each cell, (n, 1, h, w) in [0, 1], from `reference` to frames (1, 3, n, H, W)."""
    grid = points(*frames.shape[3:])
    means = adaptive_avg_pool2d(frames[0], grid) - adaptive_avg_pool2d(reference[0], grid)
    means = avg_pool2d(means, 3, 1, 1, count_include_pad=False)
    return max_pool2d(means.abs().amax(dim=0)[:, None], CELL)


def from_border(free: Tensor) -> Tensor:
    """The cells of `free` (n, 1, h, w), 0 or 1, that are connected with the border along sides.

    Only ways of at most as many cells as the shorter side has count.
    """
    reached = free.clone()
    reached[..., 1:-1, 1:-1] = 0.0
    for _ in range(min(free.shape[2:])):
        across, down = max_pool2d(reached, (1, 3), 1, (0, 1)), max_pool2d(reached, (3, 1), 1, (1, 0))
        reached = torch.maximum(across, down).mul_(free)
    return reached


def weights(moved: Tensor, levels: float, before: Tensor) -> Tensor:
    """How much each cell is held in each frame, (n, 1, h, w) from 0 to 1.

    - moved: of `change`.
    - levels: grey levels of change from which a cell moves; up to half of them it stands still.
    - before: the weights of the frame before, (1, 1, h, w).
    """
    limit = max(levels / 255.0, LEAST)
    rest = ((limit - moved) / (limit / 2.0)).clamp_(0.0, 1.0)
    rest = rest * rest * (3.0 - 2.0 * rest)
    rest = -max_pool2d(-rest, 3, 1, 1)
    rest = rest * from_border((rest > 0.0).float())
    number = torch.arange(1, len(rest) + 1, device=rest.device, dtype=rest.dtype)[:, None, None, None]
    falling = (rest + number / LET_GO).flip(0).cummin(0).values.flip(0) - number / LET_GO
    rising = torch.cat([before, falling - number / TAKE_OVER]).cummin(0).values[1:]
    return rising + number / TAKE_OVER


@dataclass(eq=False)
class BackgroundHold:
    """Holds what stands still in the frames of one video, in order.

    - levels: see `weights`.
    - reference: the video's first frame, (1, 3, 1, H, W) uint8; None before it.
    - weight: of the frame shown last, (1, 1, h, w) float32; None before the first.

    Both may be anywhere at first, and are on the device of the frames afterwards.
    """

    levels: float
    reference: Tensor | None = None
    weight: Tensor | None = None
    _unit: Tensor | None = field(default=None, init=False)

    def apply(self, pixels: Tensor, number: int) -> None:
        """Change frames (1, 3, n, H, W) in [0, 1] in place; they are the clip's from `number` on.

        A clip is cut into latents here, so a piece must end where one ends, or where the clip does.
        """
        first = 0
        while first < pixels.shape[2]:
            size = 1 if number + first == 0 else 4 - (number + first - 1) % 4
            self._latent(pixels[:, :, first : first + size])
            first += size

    def _latent(self, pixels: Tensor) -> None:
        if self.reference is None or self.weight is None:
            self.reference = bytes_of(pixels[:, :, :1])
            self.weight = pixels.new_ones(1, 1, *cells(*pixels.shape[3:]))
        if self._unit is None:
            self.reference = self.reference.to(pixels.device)
            self._unit = to_unit(self.reference, pixels.device)
        held = weights(change(pixels, self._unit), self.levels, self.weight.to(pixels.device))
        self.weight = held[-1:].clone()
        smooth = interpolate(held, size=pixels.shape[3:], mode="bilinear", align_corners=False)
        pixels.lerp_(self._unit.expand_as(pixels), smooth.transpose(0, 1)[:, None].expand_as(pixels))
