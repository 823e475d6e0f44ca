"""Tells a voice from music and noise by the waveform.

- The pitch of a voice glides; that of notes stands still or jumps; noise and drums have none.
- Speech has short pauses; music or noise under it fills them.

Limits: whispered and monotone speech have no glide. Plucked notes with gaps between them fill no pauses.
Pitch by autocorrelation after Boersma (1993).
"""

from __future__ import annotations

import numpy as np

RATE = 16000
LEAST_GLIDE = 0.12
"""Least share of a second that glides. Speech: 0.28 and more, music and noise: at most 0.06."""
LOUDEST_PAUSES_DB = -15.0
"""Level of the pauses below the speech. Speech: -16 and less, with music or noise at -10 dB: -15 and more."""

_FRAME, _HOP, _PITCH_FRAME = 400, 160, 640
_LOWEST_HZ, _HIGHEST_HZ = 70, 400
_VOICED, _SOUNDING_DB = 0.6, 25.0
_APART = 5  # hops between the pitches compared: 50 ms
_LEAST_GLIDE, _MOST_GLIDE = 0.15, 3.0  # semitones
_MOST_SECONDS = 300
_LEAST_SECONDS = 3


def levels(samples: np.ndarray) -> np.ndarray:
    """Level in dB of each 25 ms (n,) of samples at 16 kHz; minus infinity for zeros."""
    count = len(samples) // _FRAME
    power = np.empty(count)
    for start in range(0, count, 4000):
        stop = min(count, start + 4000)
        frames = np.asarray(samples[start * _FRAME : stop * _FRAME], np.float64).reshape(-1, _FRAME)
        power[start:stop] = np.square(frames).mean(1)
    with np.errstate(divide="ignore"):
        result: np.ndarray = 10 * np.log10(power)
    return result


def voice_share(samples: np.ndarray) -> float:
    """Share of the seconds with sound whose pitch glides as a voice does; 1 if no second has sound.

    samples: (n,) at 16 kHz. Of long sounds, 300 seconds spread over the whole are measured.
    """
    heard = levels(samples)
    heard = heard[np.isfinite(heard)]
    if not len(heard):
        return 1.0
    least = float(np.percentile(heard, 90)) - _SOUNDING_DB
    seconds = np.arange(len(samples) // RATE)
    if len(seconds) > _MOST_SECONDS:
        seconds = seconds[np.linspace(0, len(seconds) - 1, _MOST_SECONDS).astype(int)]
    shares = [_glide(np.asarray(samples[s * RATE : (s + 1) * RATE], np.float64), least) for s in seconds]
    known = [share >= LEAST_GLIDE for share in shares if share is not None]
    return float(np.mean(known)) if known else 1.0


def pauses_db(samples: np.ndarray) -> float | None:
    """Level of the quietest 25 ms relative to the loudest; None for less than 3 s of sound."""
    heard = levels(samples)
    heard = heard[np.isfinite(heard)]
    if len(heard) * _FRAME < _LEAST_SECONDS * RATE:
        return None
    quiet, loud = np.percentile(heard, [5, 90])
    return float(quiet - loud)


def _glide(second: np.ndarray, least_db: float) -> float | None:
    """Share of the sounding frames of a second whose pitch glides; None if little of it sounds."""
    frames = np.lib.stride_tricks.sliding_window_view(second, _PITCH_FRAME)[::_HOP]
    frames = frames - frames.mean(1, keepdims=True)
    power = np.square(frames).mean(1)
    sounding = 10 * np.log10(power + 1e-20) > least_db
    if sounding.mean() < 0.3:
        return None
    spectrum = np.abs(np.fft.rfft(frames, 2 * _PITCH_FRAME)) ** 2
    alike = np.fft.irfft(spectrum)[:, :_PITCH_FRAME]
    alike *= _PITCH_FRAME / (alike[:, :1] + 1e-20) / (_PITCH_FRAME - np.arange(_PITCH_FRAME))
    rows = np.arange(len(frames))
    lag = RATE // _HIGHEST_HZ + alike[:, RATE // _HIGHEST_HZ : RATE // _LOWEST_HZ].argmax(1)
    before, at, after = (alike[rows, lag + step] for step in (-1, 0, 1))
    voiced = sounding & (at > _VOICED) & (at >= before) & (at >= after)
    # The top of the parabola through three points is finer than a sample.
    pitch = RATE / (lag + np.clip((before - after) / (2 * (before - 2 * at + after) - 1e-9), -0.5, 0.5))
    semitones = 12 * np.abs(np.log2(pitch[_APART:] / pitch[:-_APART]))
    glides = voiced[_APART:] & voiced[:-_APART] & (semitones > _LEAST_GLIDE) & (semitones < _MOST_GLIDE)
    return float(glides.sum() / sounding.sum())
