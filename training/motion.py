"""Motion of the face besides speech (blinks, brows, gaze, head, expression), and the matching prompt.

Everything is drawn from one seed. A performance begins in the portrait's pose with the mouth at rest and
eases into motion over the first second. The portrait has its own random expression, which changes to the
prompt's expression within a second, so that the portrait does not reveal the prompt. Prompts name an
expression and an amount of motion in one of several wordings. Sometimes one of the two is missing, which
means the default (neutral, moderate).

Shapes: T video frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def _wander(rng: np.random.Generator, frames: int, slow: float, fast: float) -> np.ndarray:
    """Smooth noise (T,) of about unit size: eight sines between two frequencies in hertz."""
    time = np.arange(frames) / FPS
    frequency = np.exp(rng.uniform(np.log(slow), np.log(fast), 8))
    amplitude = frequency**-0.5
    waves = np.sin(2 * np.pi * (frequency * time[:, None] + rng.random(8))) * amplitude
    return waves.sum(1) / np.sqrt(np.square(amplitude).sum() / 2)


def _ease(frames: int, seconds: float = 1.0) -> np.ndarray:
    t = np.clip(np.arange(frames) / (FPS * seconds), 0, 1)
    return t * t * (3 - 2 * t)


def blink_track(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Lid closure (T,) in 0..1: blinks of 0.2 to 0.3 s every two to six seconds, from 0.5 s on."""
    closure = np.zeros(frames)
    moment = 0.5 + rng.exponential(1.5)
    time = np.arange(frames) / FPS
    while moment < frames / FPS:
        down, hold, up = 0.07, rng.uniform(0.02, 0.06), rng.uniform(0.11, 0.16)
        since = time - moment
        shut = np.clip(since / down, 0, 1) * np.clip(1 - (since - down - hold) / up, 0, 1)
        closure = np.maximum(closure, shut)
        moment += rng.uniform(1.5, 5.5) if rng.random() > 0.12 else 0.45
    return closure


def _gaze_track(rng: np.random.Generator, frames: int, strength: float) -> np.ndarray:
    """Gaze (T, 2) that jumps around the camera and holds for 0.5 to 3 s."""
    gaze = np.zeros((frames, 2))
    start, place = 0, np.zeros(2)
    while start < frames:
        stop = start + int(FPS * rng.uniform(0.5, 3.0))
        gaze[start:stop] = place
        place = np.zeros(2) if rng.random() < 0.5 else rng.normal(0, (0.12, 0.06)) * min(1.0, 0.4 + strength)
        start = stop
    return gaze


def perform(
    names: list[str], phones: list[Phone], frames: int, manner: Manner, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Tracks of one performance: the fields of `render.Performance` as arrays (T, n).

    names: the ARKit shapes.
    phones: phones with times in the audio, which starts at frame 1.
    frames: number of video frames; frame 0 is the portrait.
    """
    strength = STRENGTH[manner.motion]
    ease = _ease(frames)
    begin, end = (
        rng.uniform(0.7, 1.0) if smiling else 0.0
        for smiling in (rng.random() < 0.4, manner.expression == "smiling")
    )
    smile = begin + (end - begin) * _ease(frames, rng.uniform(0.4, 0.9))
    shape = smooth_articulate(phones, frames) * rng.uniform(0.95, 1.08)
    coefficients = mouth_coefficients(shape, names, smile)

    def add(name: str, track: np.ndarray | float) -> None:
        for side in ("Left", "Right") if name + "Left" in names else ("",):
            coefficients[:, names.index(name + side)] += track

    closure = blink_track(rng, frames)
    add("eyeBlink", closure * 1.0)
    add("eyeSquint", 0.12 * smile)
    brow = _wander(rng, frames, 0.15, 1.0) * ease * min(1.0, 0.35 + 0.6 * strength)
    add("browInnerUp", np.clip(0.25 * brow, 0, 0.6))
    add("browOuterUp", np.clip(0.22 * brow, 0, 0.5))
    add("browDown", np.clip(-0.18 * brow, 0, 0.4))
    base = rng.normal(0, (0.10, 0.05, 0.035))
    amount = np.array((0.10, 0.065, 0.045)) * strength
    moving = np.stack([_wander(rng, frames, 0.12, 0.9) for _ in range(3)], 1)
    nod = shape[:, 0] - shape[:, 0].mean() if frames else shape[:, 0]
    moving[:, 1] += 1.2 * np.convolve(nod, np.hanning(13) / np.hanning(13).sum(), "same")
    head = base + (moving - moving[0]) * amount * ease[:, None]
    gaze = _gaze_track(rng, frames, strength) - 0.75 * head[:, :2] * (1, -1)
    add("eyeLookUp", np.clip(gaze[:, 1], 0, 0.4))
    add("eyeLookDown", np.clip(-gaze[:, 1], 0, 0.4) * 1.2)
    sway = np.stack([_wander(rng, frames, 0.08, 0.4) for _ in range(2)], 1)
    sway = (sway - sway[0]) * (0.035, 0.015) * strength * ease[:, None]
    tracks = {"coefficients": np.clip(coefficients, 0, 1.2), "head": head, "gaze": gaze, "sway": sway}
    return {name: track.astype(np.float32) for name, track in tracks.items()}
