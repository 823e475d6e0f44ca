"""What chance decides in a performance, as white noise that the sampler's own noise carries.

A sampler of few steps averages what it cannot know: its faces do not blink, and its turning heads smear. So
chance enters at one place only. `draw_drive` draws independent standard normal numbers, one of each signal
per latent frame, and `follow` makes blinks, gaze, head motion, sway and brows from them and from nothing
else. In training, `write` puts these numbers into the noise of the same window: signal k is the coefficient
of a pattern in channel k of each latent frame. Such coefficients of white noise are independent standard
normal numbers as well. At inference nothing is written: the seed's noise has its own coefficients,
and the model plays them.

Shapes: B windows, F video frames, L latent frames, K signals, h w latent pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from training.phones import FPS

SIGNALS = ("blink", "jump", "gaze_x", "gaze_y", "yaw", "pitch", "roll", "sway_x", "sway_y", "brow")
SIDEWAYS = ("gaze_x", "yaw", "roll", "sway_x")
"""Signals that change their sign in a mirror."""
OF_THE_HEAD = ("jump", "yaw", "pitch", "roll", "sway_x", "sway_y")
"""Signals that move it or the gaze; at 0 both rest."""
OF_THE_EYES = ("blink", "jump", "gaze_x", "gaze_y", "brow")
NEAR = (1.6, 1.2)
"""Standard deviations in latent pixels of the place around an eye that carries its signals."""
FRAMES_A_LATENT = 4
BLINK_ABOVE, JUMP_ABOVE = 1.55, 1.25
"""A latent frame starts a blink in 6 % of cases, and a jump of the gaze in 11 %."""
REFRACTORY = 4
"""Least number of latent frames from one blink to the next."""
BLINK = (0.45, 1.0, 1.0, 0.75, 0.4, 0.12)
"""Lid closure in the frames of a blink."""
FIRST_BLINK = 4
HERTZ = {"yaw": 0.40, "pitch": 0.45, "roll": 0.35, "sway_x": 0.2, "sway_y": 0.2, "brow": 0.6}


def latents_of(frames: int) -> int:
    """Latent frames of a clip of `frames` video frames, the last one perhaps in part."""
    return 1 + -(-(frames - 1) // FRAMES_A_LATENT)


def draw_drive(rng: np.random.Generator, frames: int) -> np.ndarray:
    """White noise (L, K) for a performance of `frames` video frames."""
    return rng.standard_normal((latents_of(frames), len(SIGNALS))).astype(np.float32)


def follow(drive: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Tracks of `frames` frames that a drive (L, K) determines; frame 0 is at rest.

    blink: (F,) lid closure 0..1. gaze: (F, 2), of about unit size. Each name of HERTZ: (F,), of unit size
    once in motion.
    """
    numbers = {name: drive[:, place].astype(np.float64) for place, name in enumerate(SIGNALS)}
    tracks = {name: _swing(numbers[name], frames, hertz) for name, hertz in HERTZ.items()}
    return tracks | {
        "blink": _blinks(numbers["blink"], frames),
        "gaze": _gaze(numbers["jump"], np.stack([numbers["gaze_x"], numbers["gaze_y"]], 1), frames),
    }


def _first_frame(latent: int) -> int:
    return FRAMES_A_LATENT * latent - FRAMES_A_LATENT + 1


def _blinks(numbers: np.ndarray, frames: int) -> np.ndarray:
    closure = np.zeros(frames + len(BLINK))
    last = FIRST_BLINK - REFRACTORY
    for latent in np.flatnonzero(numbers > BLINK_ABOVE):
        if latent - last >= REFRACTORY:
            first = _first_frame(int(latent))
            closure[first : first + len(BLINK)] = BLINK[: max(0, len(closure) - first)]
            last = int(latent)
    return closure[:frames]


def _gaze(jumps: np.ndarray, places: np.ndarray, frames: int) -> np.ndarray:
    """Jumps between places; about half of the coordinates are exactly towards the camera."""
    aim = 1.4 * np.sign(places) * np.clip(np.abs(places) - 0.65, 0, 2)
    gaze = np.zeros((frames, 2))
    for latent in np.flatnonzero(jumps > JUMP_ABOVE):
        if latent:
            gaze[_first_frame(int(latent)) :] = aim[latent]
    return gaze


def _swing(force: np.ndarray, frames: int, hertz: float) -> np.ndarray:
    """A critically damped spring under a force that is constant within each latent frame."""
    rate = 2 * math.pi * hertz
    strength = 2 * math.sqrt(rate**3 * FPS / FRAMES_A_LATENT)
    dt = 1 / FPS
    decay = math.exp(-rate * dt)
    step = decay * np.array([[1 + rate * dt, dt], [-(rate**2) * dt, 1 - rate * dt]])
    push = np.array([(1 - decay * (1 + rate * dt)) / rate**2, decay * dt])
    state, track = np.zeros(2), np.zeros(frames)
    for frame in range(1, frames):
        pushed = strength * force[(frame + FRAMES_A_LATENT - 1) // FRAMES_A_LATENT]
        state = step @ state + push * pushed
        track[frame] = state[0]
    return track


def mirrored_drive(drive: Tensor) -> Tensor:
    """The drive (..., K) of the mirrored performance."""
    signs = [-1.0 if name in SIDEWAYS else 1.0 for name in SIGNALS]
    return drive * torch.tensor(signs, device=drive.device, dtype=drive.dtype)


def carriers(eyes: Tensor, height: int, width: int) -> Tensor:
    """The patterns (B, K, h, w) of unit norm that carry the signals of people with `eyes` (B, 2, 2).

    eyes: in the portrait, x and y in latent pixels. A chessboard, which pictures hardly contain, over the
    whole frame for the motion of the head, and around the eyes for theirs: what moves is near what it reads.
    """
    rows = torch.arange(height, device=eyes.device)[:, None]
    columns = torch.arange(width, device=eyes.device)[None]
    board = 1.0 - 2.0 * ((rows + columns) % 2)
    away_x = (columns + 0.5 - eyes[:, :, 0, None, None]) / NEAR[0]
    away_y = (rows + 0.5 - eyes[:, :, 1, None, None]) / NEAR[1]
    near = torch.exp(-0.5 * (away_x.square() + away_y.square())).sum(1, keepdim=True)
    whole = torch.ones_like(near)
    patterns = torch.cat([near if name in OF_THE_EYES else whole for name in SIGNALS], 1) * board
    return patterns / patterns.flatten(2).norm(dim=2)[..., None, None]


def read(noise: Tensor, eyes: Tensor) -> Tensor:
    """The drive (B, L, K) that noise (B, C, L, h, w) carries, see `carriers`."""
    patterns = carriers(eyes, *noise.shape[-2:])
    return torch.einsum("bklhw,bkhw->blk", noise[:, : len(SIGNALS)], patterns)


def write(noise: Tensor, drive: Tensor, eyes: Tensor) -> Tensor:
    """The noise (B, C, L, h, w) with another drive (B, L, K)."""
    patterns = carriers(eyes, *noise.shape[-2:])
    change = torch.einsum("blk,bkhw->bklhw", drive - read(noise, eyes), patterns)
    return torch.cat([noise[:, : len(SIGNALS)] + change, noise[:, len(SIGNALS) :]], 1)


def windows_of(drive: Tensor, starts: Tensor, latents: int) -> Tensor:
    """The drive (B, W, latents, K) of windows that begin at frames `starts` (B, W), multiples of four.

    drive: (B, L, K).
    """
    rows = (starts // FRAMES_A_LATENT)[..., None] + torch.arange(latents, device=drive.device)
    return drive[torch.arange(len(drive), device=drive.device)[:, None, None], rows]
