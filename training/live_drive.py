"""What chance decides in a live performance: numbers that change slowly, and a pose that is their function.

`training.drive` makes motion from independent numbers: a pose is the sum of all numbers so far. A model that
makes short blocks sees only the numbers of the block in hand, so once its pose is wrong it stays wrong, and
it learns to paint the mean. Here the numbers themselves change slowly (`omniavatar.sampling.noise`, a span of
`SPAN` latents), and the pose at the end of a latent is its number. A block knows its poses from its own
noise, and the one it begins with from the picture before; nothing can drift.

Blinks are short, so their number is independent from latent to latent: the first channel of the noise, which
carries it, stays white (`noise_white`). A blink lies inside a block of two latents, and happens where the
number of the block's first latent is above a level.
Shapes: F video frames, L latent frames, K signals; B stories, h w latent pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omniavatar.sampling.noise import span_weights
from training.drive import BLINK, FRAMES_A_LATENT, SIGNALS, latents_of, write

SPAN = 8
"""Motion of 0.4 Hz, as in `training.drive`."""
BLOCK = 2
MOVING = ("yaw", "pitch", "roll", "sway_x", "sway_y", "brow")
RAMP = 12
"""Frames in which motion grows from the portrait's rest: the first two blocks."""
WHITE = 1
"""Channels of the noise that do not change slowly: the one of blinks."""
BLINK_ABOVE = 1.28
"""About 18 blinks a minute."""
SURE = 0.08
"""A blink is as complete as its number is above the level, over this: nothing depends on the last digit."""
CENTRE, EDGE, FAR = 0.8, 1.05, 1.3
"""The gaze is towards the camera below the first number, and this far aside above the second."""


def draw_live_drive(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Numbers (L, K) for a performance of `frames` video frames: standard normal, and slow."""
    weights, latents = span_weights(SPAN), latents_of(frames)
    white = rng.standard_normal((latents + SPAN - 1, len(SIGNALS)))
    drive = np.stack([np.convolve(row, weights, "valid") for row in white.T], 1).astype(np.float32)
    drive[:, :WHITE] = white[SPAN - 1 :, :WHITE]
    return drive


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
    for first in range(BLOCK, len(numbers), BLOCK):
        complete = np.clip((numbers[first] - BLINK_ABOVE) / SURE, 0, 1)
        begin = FRAMES_A_LATENT * (first - 1) + 1
        closure[begin : begin + len(BLINK)] = complete * np.array(BLINK)
    return closure[:frames]


def smooth(white: Tensor, span: int) -> Tensor:
    """Noise (B, C, L, h, w) over `span` latents of independent noise (B, C, L + span - 1, h, w); the first
    `WHITE` channels stay independent."""
    latents = white.shape[2] - span + 1
    made = torch.zeros_like(white[:, :, :latents])
    for age, weight in enumerate(span_weights(span).tolist()):
        made += weight * white[:, :, span - 1 - age : span - 1 - age + latents]
    made[:, :WHITE] = white[:, :WHITE, span - 1 :]
    return made


def blinking(drive: Tensor) -> Tensor:
    """1 for the latents (B, L) in which a drive (B, L, K) calls for a blink, else 0."""
    number = drive[..., SIGNALS.index("blink")]
    starts = (number > BLINK_ABOVE).float()
    starts[:, :BLOCK] = 0
    starts[:, 1::BLOCK] = 0
    starts[:, 1::BLOCK] = starts[:, : 2 * (starts.shape[1] // BLOCK) : BLOCK]
    return starts


def carried_noise(drive: Tensor, eyes: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise (B, 16, L, h, w) as the engine draws it, which carries a drive (B, L, K)."""
    batch, latents = drive.shape[:2]
    shape = (batch, 16, latents + SPAN - 1, height, width)
    return write(smooth(torch.randn(shape, device=drive.device, generator=generator), SPAN), drive, eyes)
