"""Motion of the face besides speech (blinks, brows, gaze, head, expression), and the matching prompt.

Everything is drawn from one seed; what moves by chance follows a drive (`training.drive`). A performance
begins in the portrait's pose with the mouth at rest. The portrait has its own random expression, which
changes to the prompt's expression within a second, so that the portrait does not reveal the prompt. Prompts
name an expression and an amount of motion in one of several wordings. Sometimes one of the two is missing,
which means the default (neutral, moderate).

Shapes: T video frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.drive import draw_drive, follow
from training.live_drive import draw_live_drive, follow_live
from training.phones import FPS, Phone, mouth_coefficients, smooth_articulate

EXPRESSIONS = {
    "neutral": ("neutral", "with a neutral expression", "calm and serious", "serious"),
    "smiling": ("smiling", "with a smile", "happy and smiling", "cheerful"),
}
MOTIONS = {
    "still": ("still", "keeping the head still", "barely moving", "motionless"),
    "moderate": ("", "moving naturally"),
    "lively": ("lively", "with lively head movements", "animated and energetic", "moving the head a lot"),
}
STRENGTH = {"still": 0.12, "moderate": 0.55, "lively": 1.25}
_OPENINGS = (
    "A person is talking to the camera",
    "A realistic video of a person speaking directly to the camera",
    "A talking head",
    "A portrait of someone speaking",
    "Someone talks",
    "A man or a woman speaks to the viewer",
)
_CLOSINGS = ("", "in front of a plain background", "in soft light", "the background is blurred", "close-up")


@dataclass(frozen=True)
class Manner:
    """The manner of a performance: keys of EXPRESSIONS and MOTIONS, and the prompt."""

    expression: str
    motion: str
    prompt: str


def draw_manner(rng: np.random.Generator) -> Manner:
    """A random manner with one of its prompts."""
    expression = str(rng.choice(list(EXPRESSIONS)))
    motion = str(rng.choice(list(MOTIONS), p=(0.35, 0.2, 0.45)))
    words = [str(rng.choice(EXPRESSIONS[expression])), str(rng.choice(MOTIONS[motion]))]
    if expression == "neutral" and rng.random() < 0.3:
        words[0] = ""
    rng.shuffle(words)
    parts = [str(rng.choice(_OPENINGS)), *words, str(rng.choice(_CLOSINGS))]
    if rng.random() < 0.15:
        parts = words
    return Manner(expression, motion, ", ".join(part for part in parts if part))


def _ease(frames: int, seconds: float = 1.0) -> np.ndarray:
    t = np.clip(np.arange(frames) / (FPS * seconds), 0, 1)
    return t * t * (3 - 2 * t)


def _nodding(jaw: np.ndarray, live: bool) -> np.ndarray:
    """The head's share in an open jaw (T,): smoothed around each frame, or live over the frames before it."""
    frames = 9 if live else 13
    kernel = np.hanning(frames) / np.hanning(frames).sum()
    return np.convolve(jaw, kernel)[: len(jaw)] if live else np.convolve(jaw, kernel, "same")


def perform(
    names: list[str],
    phones: list[Phone],
    frames: int,
    manner: Manner,
    rng: np.random.Generator,
    drive: np.ndarray | None = None,
    pose: tuple[float, float, float] | None = None,
    live: bool = False,
) -> dict[str, np.ndarray]:
    """Tracks of one performance: the fields of `render.Performance` as arrays (T, n).

    names: the ARKit shapes.
    phones: phones with times in the audio, which starts at frame 1.
    frames: number of video frames; frame 0 is the portrait.
    drive: see `training.drive`; without one, it is drawn from `rng`.
    pose: yaw, pitch and roll of the head in frame 0; without one, they are drawn from `rng`.
    live: the drive is one of `training.live_drive`, and a nod follows the sound before it, not after.
    """
    strength = STRENGTH[manner.motion]
    draw, follows = (draw_live_drive, follow_live) if live else (draw_drive, follow)
    chance = follows(draw(rng, frames) if drive is None else drive, frames)
    begin = rng.uniform(0.7, 1.0) if rng.random() < 0.4 else 0.0
    end = 0.85 if manner.expression == "smiling" else 0.0
    smile = begin + (end - begin) * _ease(frames, 0.6)
    shape = smooth_articulate(phones, frames) * rng.uniform(0.95, 1.08)
    coefficients = mouth_coefficients(shape, names, smile)

    def add(name: str, track: np.ndarray | float) -> None:
        for side in ("Left", "Right") if name + "Left" in names else ("",):
            coefficients[:, names.index(name + side)] += track

    add("eyeBlink", chance["blink"])
    add("eyeSquint", 0.12 * smile)
    brow = chance["brow"] * min(1.0, 0.35 + 0.6 * strength)
    add("browInnerUp", np.clip(0.25 * brow, 0, 0.6))
    add("browOuterUp", np.clip(0.22 * brow, 0, 0.5))
    add("browDown", np.clip(-0.18 * brow, 0, 0.4))
    base = rng.normal(0, (0.10, 0.05, 0.035)) if pose is None else np.array(pose)
    amount = np.array((0.10, 0.065, 0.045)) * strength
    moving = np.stack([chance["yaw"], chance["pitch"], chance["roll"]], 1)
    nod = shape[:, 0] - shape[0, 0]
    moving[:, 1] += 1.2 * _nodding(nod, live) * _ease(frames)
    head = base + moving * amount
    glance = chance["gaze"] * (0.12, 0.06) * min(1.0, 0.4 + strength)
    gaze = glance - 0.75 * head[:, :2] * (1, -1)
    add("eyeLookUp", np.clip(gaze[:, 1], 0, 0.4))
    add("eyeLookDown", np.clip(-gaze[:, 1], 0, 0.4) * 1.2)
    sway = np.stack([chance["sway_x"], chance["sway_y"]], 1) * (0.035, 0.015) * strength
    tracks = {"coefficients": np.clip(coefficients, 0, 1.2), "head": head, "gaze": gaze, "sway": sway}
    return {name: track.astype(np.float32) for name, track in tracks.items()}
