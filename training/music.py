"""Music for training: a beat, a bass, chords and a melody of synthetic instruments, from a seed.

The model hears it behind speech, where the mouth must follow the speech alone, and by itself, where the mouth
rests. It was written for this project.
"""

from __future__ import annotations

import numpy as np

from training.speech import SAMPLE_RATE

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10))
STEPS_A_BEAT = 4


def music(rng: np.random.Generator, total: int) -> np.ndarray:
    """`total` samples of music, float of unit power."""
    beat = SAMPLE_RATE * 60 / rng.uniform(70, 150)
    step = int(beat / STEPS_A_BEAT)
    root = 110 * 2 ** rng.uniform(-1, 1)
    scale = SCALES[rng.integers(2)]
    bright = int(rng.integers(2, 9))
    track = np.zeros(total + 4 * SAMPLE_RATE)
    parts = rng.random(4) < (0.7, 0.7, 0.8, 0.7)
    if not parts.any():
        parts[2] = True
    degree = int(rng.integers(7))
    for number in range(-(-total // step)):
        begin = number * step
        bar = number % (4 * STEPS_A_BEAT)
        degree = int(rng.integers(7)) if bar == 0 else degree
        if parts[0] and bar % STEPS_A_BEAT in (0, 2) and rng.random() < 0.85:
            _add(track, begin, _drum(rng, bar % (2 * STEPS_A_BEAT) == 0))
        if parts[1] and bar % STEPS_A_BEAT == 0:
            _add(track, begin, 0.8 * _tone(root / 2 * _pitch(scale, degree), 0.9 * beat, 3, 3.0))
        if parts[2] and bar == 0:
            for third in (0, 2, 4):
                _add(
                    track, begin, 0.35 * _tone(root * _pitch(scale, degree + third), 3.5 * beat, bright, 1.0)
                )
        if parts[3] and rng.random() < 0.4:
            pitch = 2 * root * _pitch(scale, degree + int(rng.integers(-2, 7)))
            _add(track, begin, 0.6 * _tone(pitch, beat * rng.choice([0.5, 1, 2]), bright, 2.5))
    track = track[:total]
    return track / max(1e-6, float(np.sqrt(np.square(track).mean())))


def _add(track: np.ndarray, begin: int, sound: np.ndarray) -> None:
    piece = track[begin : begin + len(sound)]
    piece += sound[: len(piece)]


def _pitch(scale: tuple[int, ...], degree: int) -> float:
    octave, place = divmod(degree, len(scale))
    return float(2 ** (octave + scale[place] / 12))


def _tone(hertz: float, samples: float, harmonics: int, decay: float) -> np.ndarray:
    time = np.arange(int(samples)) / SAMPLE_RATE
    waves = sum(
        np.sin(2 * np.pi * hertz * order * time) / order
        for order in range(1, harmonics + 1)
        if hertz * order < SAMPLE_RATE / 2
    )
    swell = np.minimum(1, time / 0.01) * np.exp(-decay * time)
    return waves * swell * np.minimum(1, (time[-1] - time) / 0.02 + 1e-3) if len(time) else time


def _drum(rng: np.random.Generator, low: bool) -> np.ndarray:
    time = np.arange(SAMPLE_RATE // 5) / SAMPLE_RATE
    if low:
        return 1.5 * np.sin(2 * np.pi * 60 * time * (1 + np.exp(-30 * time))) * np.exp(-15 * time)
    return 0.7 * rng.normal(0, 1, len(time)) * np.exp(-35 * time)
