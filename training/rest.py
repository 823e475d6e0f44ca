"""What stands still in a film should stand still in what the model makes.

Backgrounds have small errors, so plain squares hardly count them; but they change from window to window and
within each, and a viewer sees a wall that breathes. `resting` finds the places, whose weight the loss raises,
and `breathing` counts the part of the error that is common to all of them.

Shapes: B clips, N = 4T-3 video frames, T latent frames, h w latent pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXELS = 8
"""Pixels of a latent pixel's side."""
STATIC = 2
"""Grey levels by which a resting pixel may move."""
MARGIN = 4
"""Pixels around a latent pixel that must rest as well."""


def resting(frames: Tensor) -> Tensor:
    """Which latent pixels (B, h, w) show nothing that moves in frames uint8 (B, N, 3, H, W): 1 or 0."""
    moves = (frames.amax(1).int() - frames.amin(1).int()).amax(1) > STATIC
    side = PIXELS + 2 * MARGIN
    return 1 - torch.nn.functional.max_pool2d(moves.float()[:, None], side, PIXELS, MARGIN)[:, 0]


def breathing(error: Tensor, rest: Tensor, weight: Tensor) -> Tensor:
    """Mean square of the mean error of resting places; errors (B, C, T, h, w), places (B, h, w).

    weight: (B, 1, T, h, w), 0 where the latent is given.
    """
    places = rest[:, None, None] * (weight > 0)
    count = places.sum((-2, -1)).clamp_min(1)
    return ((error * places).sum((-2, -1)) / count).square().mean()
