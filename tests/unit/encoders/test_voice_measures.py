"""Warnings about music and noise, alone and under a voice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from omniavatar.assets import SPEECH
from omniavatar.encoders.voice_measures import LOUDEST_PAUSES_DB, RATE, levels, pauses_db, voice_share
from omniavatar.media.audio import decode_mono

SECONDS = 8
TIME = np.arange(SECONDS * RATE) / RATE


def _notes(rng: np.random.Generator, overtones: int, decay: float, longest: float) -> np.ndarray:
    """Chords that begin at random times, as on an organ (little decay) or a piano."""
    sound = np.zeros(len(TIME))
    begin = 0
    while begin < len(sound):
        end = min(len(sound), begin + int(rng.uniform(longest / 4, longest) * RATE))
        time = TIME[: end - begin]
        root = 110 * 2 ** rng.uniform(0, 2)
        for ratio in (1, 1.25, 1.5, 2):
            for k in range(1, overtones + 1):
                sound[begin:end] += np.sin(2 * np.pi * root * ratio * k * time) / k * np.exp(-decay * time)
        begin = end
    return sound


def _drums(rng: np.random.Generator) -> np.ndarray:
    sound = np.zeros(len(TIME))
    beat = RATE // 4
    for number, begin in enumerate(range(0, len(sound), beat)):
        time = TIME[:beat]
        kick = np.sin(2 * np.pi * (60 * time + 40 * np.exp(-30 * time))) * np.exp(-8 * time)
        sound[begin : begin + beat] = kick if number % 2 else rng.normal(0, 1, beat) * np.exp(-15 * time)
    return sound


def _coloured(rng: np.random.Generator, power: float) -> np.ndarray:
    spectrum = np.fft.rfft(rng.normal(0, 1, len(TIME)))
    return np.fft.irfft(spectrum / (1 + np.arange(len(spectrum))) ** power)


SOUNDS = {
    "sine chords": lambda rng: _notes(rng, 1, 3, 0.6),
    "organ": lambda rng: _notes(rng, 8, 0.2, 2),
    "piano": lambda rng: _notes(rng, 6, 3, 1.5),
    "slow piano": lambda rng: _notes(rng, 12, 1, 1.5),
    "drums": _drums,
    "band": lambda rng: _drums(rng) + 0.2 * _notes(rng, 8, 1, 1),
    "white noise": lambda rng: _coloured(rng, 0),
    "pink noise": lambda rng: _coloured(rng, 0.5),
    "brown noise": lambda rng: _coloured(rng, 1),
    "mains hum": lambda rng: np.sin(100 * np.pi * TIME) + 0.3 * np.sin(300 * np.pi * TIME),
    "tone": lambda rng: np.sin(880 * np.pi * TIME),
    "crickets": lambda rng: np.sin(8000 * np.pi * TIME) * (np.sin(16 * np.pi * TIME) > 0.5),
    "melody": lambda rng: np.sin(
        2 * np.pi * np.cumsum(np.repeat(220 * 2 ** (rng.integers(0, 24, 32) / 12), len(TIME) // 32)) / RATE
    ),
}


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    path = tmp_path_factory.mktemp("speech") / "speech.f32"
    decode_mono(SPEECH, path)
    return np.fromfile(path, "<f4")


def _level(sound: np.ndarray) -> np.ndarray:
    return sound / np.sqrt(np.square(sound).mean())


def test_speech_is_a_voice_without_music(speech: np.ndarray) -> None:
    for gain in (1, 0.01):
        assert voice_share(gain * speech) == 1
        assert (pauses_db(gain * speech) or 0) < LOUDEST_PAUSES_DB - 5
    for start in range(0, len(speech) - 3 * RATE, RATE // 4):
        part = speech[start : start + 3 * RATE]
        assert voice_share(part) == 1 and (pauses_db(part) or -99) < LOUDEST_PAUSES_DB, start / RATE


@pytest.mark.parametrize("kind", SOUNDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_music_and_noise_are_no_voice(kind: str, seed: int) -> None:
    assert voice_share(_level(SOUNDS[kind](np.random.default_rng(seed)))) < 0.25


@pytest.mark.parametrize("kind", ["organ", "band", "white noise", "pink noise"])
def test_music_and_noise_under_a_voice_fill_its_pauses(speech: np.ndarray, kind: str) -> None:
    other = np.resize(_level(SOUNDS[kind](np.random.default_rng(0))), len(speech))
    both = _level(speech) + other * 10 ** (-8 / 20)
    assert (pauses_db(both) or -99) >= LOUDEST_PAUSES_DB
    assert voice_share(_level(speech) + other * 10 ** (-20 / 20)) > 0.9, "quiet noise changes nothing"


def test_silence_and_short_sounds_are_not_judged() -> None:
    assert voice_share(np.zeros(5 * RATE, np.float32)) == 1 == voice_share(np.ones(100))
    assert pauses_db(np.zeros(5 * RATE)) is None and pauses_db(np.ones(2 * RATE)) is None
    assert np.isneginf(levels(np.zeros(800))).all() and levels(np.ones(400)) == [0]


def test_a_long_sound_is_measured_in_parts(speech: np.ndarray, tmp_path: Path) -> None:
    long = np.memmap(tmp_path / "long.f32", np.float32, "w+", shape=(60 * len(speech),))
    long[:] = np.tile(speech, 60)
    assert voice_share(long) > 0.9
