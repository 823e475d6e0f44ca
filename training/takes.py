"""Takes: a piece of sound with the motion of the face that speaks it, without pixels; made on CPU cores.

A take begins with a short silence, followed by speech of one voice with pauses; some takes start in the
middle of a sentence. Speed and pitch vary together. A few takes have hum, noise, chords or music instead of
speech, with the mouth at rest, and others have music behind the speech, so that the model learns not to react
to them. A take depends only on its seed and the speech.

Shapes: T video frames (frame 0 is the portrait), 640 samples per frame from frame 1 on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from training.drive import draw_drive
from training.live_drive import draw_live_drive
from training.motion import Manner, draw_manner, perform
from training.music import music
from training.phones import FPS, Phone, frame_phones, smooth_articulate
from training.speech import SAMPLE_RATE, SpeechSet, resample

SAMPLES_A_FRAME = SAMPLE_RATE // FPS
NO_SPEECH_ODDS = 0.08
MUSIC_ODDS = 0.25
MUSIC_BELOW_SPEECH = (0.0, 20.0)
"""Decibels."""


@dataclass(frozen=True, eq=False)
class Take:
    """One take.

    sound: ((T-1)*640,) int16.
    phones: (T,), index in PHONES.
    shape: (T, A), articulators.
    tracks: from `perform`.
    drive: (L, K), see `training.drive` and `training.live_drive`.
    """

    sound: np.ndarray
    phones: np.ndarray
    shape: np.ndarray
    manner: Manner
    tracks: dict[str, np.ndarray]
    drive: np.ndarray


def make_take(
    speech: SpeechSet,
    names: list[str],
    frames: int,
    seed: int,
    speech_alone: bool = False,
    live: bool = False,
) -> Take:
    """The take with this `seed`, of `frames` video frames.

    names: the ARKit shapes, in order.
    speech_alone: no take without speech, and no music.
    live: motion as of `training.live_drive`.
    """
    rng = np.random.default_rng((seed, 77))
    total = (frames - 1) * SAMPLES_A_FRAME
    wordless, with_band = rng.random(2) < (NO_SPEECH_ODDS, MUSIC_ODDS)
    if wordless and not speech_alone:
        sound, phones = no_speech(rng, total), []
    else:
        sound, phones = _speak(speech, rng, total)
        if with_band and not speech_alone:
            sound = with_music(sound, np.random.default_rng((seed, 78)))
    manner = draw_manner(rng)
    drive = draw_live_drive(rng, frames) if live else draw_drive(rng, frames)
    return Take(
        sound=sound,
        phones=frame_phones(phones, frames),
        shape=smooth_articulate(phones, frames).astype(np.float32),
        manner=manner,
        tracks=perform(names, phones, frames, manner, rng, drive, live=live),
        drive=drive,
    )


def _speak(speech: SpeechSet, rng: np.random.Generator, total: int) -> tuple[np.ndarray, list[Phone]]:
    voice = speech.voices[rng.integers(len(speech))]
    same = np.flatnonzero(speech.voices == voice)
    speed = np.exp(rng.uniform(np.log(0.86), np.log(1.16)))
    sound = np.zeros(total, np.float32)
    phones: list[Phone] = []
    place = int(rng.uniform(0.1, 0.45) * SAMPLE_RATE)
    enter_middle = rng.random() < 0.5
    while place < total:
        samples, spoken = speech.utterance(int(rng.choice(same)))
        start = 0.0
        if enter_middle and len(spoken) > 8:
            start = spoken[int(rng.integers(1, len(spoken) - 4))].start
            enter_middle = False
        piece = resample(samples[int(start * SAMPLE_RATE) :].astype(np.float32), SAMPLE_RATE * speed)
        if start:
            piece[:80] *= np.linspace(0, 1, 80)
        piece = piece[: total - place]
        sound[place : place + len(piece)] = piece
        shift = place / SAMPLE_RATE
        phones += [
            Phone(phone.name, (phone.start - start) / speed + shift, (phone.end - start) / speed + shift)
            for phone in spoken
            if phone.start >= start - 1e-6 and (phone.start - start) / speed + shift < total / SAMPLE_RATE
        ]
        place += len(piece) + int(rng.exponential(0.25) * SAMPLE_RATE)
    return np.clip(sound, -32768, 32767).astype(np.int16), phones


def with_music(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int16 speech with music behind it, from the start to the end."""
    level = float(np.sqrt(np.square(sound[sound != 0].astype(np.float64)).mean())) if sound.any() else 1000.0
    quieter = 10 ** (-rng.uniform(*MUSIC_BELOW_SPEECH) / 20)
    mixed = sound + level * quieter * music(rng, len(sound))
    return (mixed * min(1.0, 32000 / max(1.0, float(np.abs(mixed).max())))).astype(np.int16)


def no_speech(rng: np.random.Generator, total: int) -> np.ndarray:
    """Sound without speech: hiss, hum, coloured noise, a few chords or music."""
    time = np.arange(total) / SAMPLE_RATE
    kind = rng.integers(5)
    if kind == 0:
        sound = rng.normal(0, 1, total) * np.exp(rng.uniform(np.log(3), np.log(3000)))
    elif kind == 1:
        steps = np.cumsum(rng.normal(0, 1, total))
        sound = (steps - np.convolve(steps, np.ones(400) / 400, "same")) * rng.uniform(20, 300)
    elif kind > 2:
        sound = music(rng, total) * np.exp(rng.uniform(np.log(300), np.log(6000)))
    else:
        sound = np.zeros(total)
        begin = 0
        while begin < total:
            stop = begin + int(rng.uniform(0.15, 0.6) * SAMPLE_RATE)
            root = 110 * 2 ** rng.uniform(0, 3)
            for ratio in (1, 1.25, 1.5, 2):
                tone = np.sin(2 * np.pi * root * ratio * time[begin:stop])
                sound[begin:stop] += (
                    tone * rng.uniform(300, 2500) * np.exp(-3 * (time[begin:stop] - time[begin]))
                )
            begin = stop
    return np.clip(sound, -32768, 32767).astype(np.int16)


@functools.lru_cache(1)
def _open_speech(folder: Path) -> SpeechSet:
    return SpeechSet.open(folder)


def _work(folder: Path, names: list[str], frames: int, live: bool, seeds: list[int]) -> list[Take]:
    speech = _open_speech(folder)
    return [make_take(speech, names, frames, seed, live=live) for seed in seeds]


class TakeFactory:
    """Takes in the order of their seeds; `workers` processes make them ahead from the speech in `folder`.

    live: see `make_take`.
    """

    def __init__(self, folder: Path, names: list[str], workers: int, live: bool = False) -> None:
        self.folder, self.names, self.workers, self.live = folder, names, workers, live
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"))

    def stream(self, frames: int, first_seed: int, chunk: int = 8) -> Iterator[Take]:
        """Takes first_seed, first_seed + 1, ... without end; at most `2 * workers` chunks are made ahead."""
        waiting = []
        seed = first_seed
        while True:
            while len(waiting) < 2 * self.workers:
                seeds = list(range(seed, seed + chunk))
                waiting.append(self.pool.submit(_work, self.folder, self.names, frames, self.live, seeds))
                seed += chunk
            yield from waiting.pop(0).result()

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)
