"""What chance decides in a live performance: numbers that change slowly, and a pose that is their function.

`training.drive` makes motion from independent numbers: a pose is the sum of all numbers so far. A model that
makes short blocks sees only the numbers of the block in hand, so once its pose is wrong it stays wrong, and
it learns to paint the mean. Here the numbers themselves change slowly (`omniavatar.sampling.noise`, a span of
`SPAN` latents), and the pose at the end of a latent is its number. A block knows its poses from its own
noise, and the one it begins with from the picture before; nothing can drift.

Blinks lie inside a block of two latents. They happen where a number rises over a level from the block's first
latent to its second.
Shapes: F video frames, L latent frames, K signals; B stories, h w latent pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omniavatar.sampling.noise import span_weights
from training.drive import FRAMES_A_LATENT, SIGNALS, latents_of, write

SPAN = 8
"""Motion of 0.4 Hz, as in `training.drive`."""
BLOCK = 2
MOVING = ("yaw", "pitch", "roll", "sway_x", "sway_y", "brow")
RAMP = 12
"""Frames in which motion grows from the portrait's rest: the first two blocks."""
BLINK_LEVELS = (-0.7, 0.7)
"""About 18 blinks a minute."""
SURE = 0.04
"""A blink is as complete as both numbers are away from the level, over this; so nothing depends on the last
digit of a number."""
BLINK = (0.0, 0.45, 1.0, 1.0, 0.75, 0.4, 0.12, 0.0)
"""Lid closure in the frames of a block."""
CENTRE, EDGE, FAR = 0.8, 1.05, 1.3
"""The gaze is towards the camera below the first number, and this far aside above the second."""


def draw_live_drive(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Numbers (L, K) for a performance of `frames` video frames: standard normal, and slow."""
    weights, latents = span_weights(SPAN), latents_of(frames)
    white = rng.standard_normal((latents + SPAN - 1, len(SIGNALS)))
    return np.stack([np.convolve(row, weights, "valid") for row in white.T], 1).astype(np.float32)


def follow_live(drive: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Tracks as of `training.drive.follow` that a drive (L, K) determines; frame 0 is at rest."""
    place = np.arange(frames) / FRAMES_A_LATENT
    rising = np.clip(np.arange(frames) / RAMP, 0, 1)
    ease = rising * rising * (3 - 2 * rising)

    def along(name: str) -> np.ndarray:
        numbers = drive[:, SIGNALS.index(name)].astype(np.float64)
        return ease * np.interp(place, np.arange(len(numbers)), numbers)

    tracks = {name: along(name) for name in MOVING}
    return tracks | {
        "blink": _blinks(drive[:, SIGNALS.index("blink")], frames),
        "gaze": np.stack([_aim(along("gaze_x")), _aim(along("gaze_y"))], 1),
    }


def _aim(numbers: np.ndarray) -> np.ndarray:
    part = np.clip((np.abs(numbers) - CENTRE) / (EDGE - CENTRE), 0, 1)
    return FAR * np.sign(numbers) * part * part * (3 - 2 * part)


def _blinks(numbers: np.ndarray, frames: int) -> np.ndarray:
    """Lid closure; the portrait's block has none, because it has one frame in its first latent."""
    closure = np.zeros(frames + len(BLINK))
    for first in range(BLOCK, len(numbers) - 1, BLOCK):
        before, after = numbers[first : first + BLOCK]
        for level in BLINK_LEVELS:
            if before < level <= after:
                complete = min(1.0, min(level - before, after - level) / SURE)
                begin = FRAMES_A_LATENT * (first - 1) + 1
                closure[begin : begin + len(BLINK)] = complete * np.array(BLINK)
    return closure[:frames]


def smooth(white: Tensor, span: int) -> Tensor:
    """Noise (B, C, L, h, w) over `span` latents of independent noise (B, C, L + span - 1, h, w)."""
    latents = white.shape[2] - span + 1
    made = torch.zeros_like(white[:, :, :latents])
    for age, weight in enumerate(span_weights(span).tolist()):
        made += weight * white[:, :, span - 1 - age : span - 1 - age + latents]
    return made


def carried_noise(drive: Tensor, eyes: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise (B, 16, L, h, w) as the engine draws it, which carries a drive (B, L, K)."""
    batch, latents = drive.shape[:2]
    shape = (batch, 16, latents + SPAN - 1, height, width)
    return write(smooth(torch.randn(shape, device=drive.device, generator=generator), SPAN), drive, eyes)
