"""Sound that comes in pieces: checks, another sample rate, and a line of samples that know their arrival."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from omniavatar.errors import InputError
from omniavatar.media.resample import WAVEFORM_BLOCK

LEAST_RATE, MOST_RATE = 4000, 384000
MOST_CHANNELS = 8
MOST_BYTES = 8 * 2**20
"""Of one pushed piece."""
MOST_WAITING_S = 120.0
"""Seconds of sound that may wait for its block."""
SPEECH_LEVEL = 10 ** (-45 / 20)
"""Root mean square from which sound counts as speech: -45 dB of full scale."""


def check_rate(rate: Any) -> int:
    """`rate` as an int. Raises InputError."""
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer):
        raise InputError(f"rate: must be a whole number of samples a second, not {rate!r}; try 16000")
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise InputError(
            f"rate: {rate} samples a second cannot be used; give {LEAST_RATE} to {MOST_RATE}, such as 16000"
        )
    return int(rate)


def mono(pcm: Any) -> np.ndarray:
    """(n,) float32 in [-1, 1] of a piece of sound.

    - pcm: (n,) or (n, channels), int16 or float in [-1, 1]; or bytes of mono int16 samples.

    Raises InputError.
    """
    if isinstance(pcm, str):
        raise InputError("sound: is text; give int16 or float samples")
    if isinstance(pcm, bytes | bytearray | memoryview):
        if len(pcm) % 2:
            raise InputError(f"sound: {len(pcm)} bytes are not whole 16-bit samples; send an even number")
        pcm = np.frombuffer(pcm, "<i2")
    if not isinstance(pcm, np.ndarray):
        raise InputError(f"sound: is a {type(pcm).__name__}; give a NumPy array or bytes of int16 samples")
    if pcm.nbytes > MOST_BYTES:
        raise InputError(
            f"sound: a piece has {pcm.nbytes:,} bytes, the most is {MOST_BYTES:,}; push smaller pieces"
        )
    if pcm.ndim not in (1, 2) or (pcm.ndim == 2 and not 1 <= pcm.shape[1] <= MOST_CHANNELS):
        raise InputError(f"sound: has the shape {pcm.shape}; give (samples,) or (samples, channels)")
    if pcm.dtype == np.int16:
        samples = pcm.astype(np.float32) / 32768
    elif pcm.dtype.kind == "f":
        samples = pcm.astype(np.float32)
        if not np.isfinite(samples).all():
            raise InputError("sound: has values that are not finite (NaN or infinite); check the source")
    else:
        raise InputError(f"sound: has {pcm.dtype} values; give int16, or float between -1 and 1")
    if samples.ndim == 2:
        samples = samples.mean(1)
    return samples.clip(-1, 1)


def is_speech(samples: np.ndarray) -> bool:
    """Whether (n,) int16 samples are loud enough for speech."""
    if not len(samples):
        return False
    level = np.sqrt(np.mean(np.square(samples.astype(np.float32) / 32768)))
    return bool(level >= SPEECH_LEVEL)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1] as int16."""
    return (samples * 32767).round().clip(-32768, 32767).astype(np.int16)


class Resampler:
    """Mono float32 sound from one rate to another, in pieces; it holds a few milliseconds back."""

    def __init__(self, rate: int, new_rate: int) -> None:
        self.rate, self.new_rate = rate, new_rate
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=new_rate)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """What is complete at the new rate, (n,) float32."""
        if self.rate == self.new_rate or not len(samples):
            return samples
        pieces = []
        for start in range(0, len(samples), WAVEFORM_BLOCK):
            piece = np.ascontiguousarray(samples[start : start + WAVEFORM_BLOCK])
            frame = av.AudioFrame.from_ndarray(piece[None], format="flt", layout="mono")
            frame.sample_rate = self.rate
            pieces += [made.to_ndarray()[0] for made in self._resampler.resample(frame)]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.float32)

    def finish(self) -> np.ndarray:
        """What was held back. The resampler cannot be used afterwards."""
        if self.rate == self.new_rate:
            return np.zeros(0, np.float32)
        rest = [made.to_ndarray()[0] for made in self._resampler.resample(None)]
        return np.concatenate(rest) if rest else np.zeros(0, np.float32)


@dataclass(frozen=True, eq=False)
class Stretch:
    """Samples (n,) int16 that arrived together. arrived: when; None for silence that nobody pushed."""

    samples: np.ndarray
    arrived: float | None


class SoundLine:
    """Stretches of sound in order."""

    def __init__(self) -> None:
        self._stretches: deque[Stretch] = deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Stretch]:
        return iter(self._stretches)

    def append(self, samples: np.ndarray, arrived: float | None) -> None:
        if len(samples):
            self._stretches.append(Stretch(samples, arrived))
            self._length += len(samples)

    def append_silence(self, count: int) -> None:
        self.append(np.zeros(count, np.int16), None)

    def take(self, count: int) -> list[Stretch]:
        """Remove the first `count` samples, or all if they are fewer."""
        taken = []
        while count and self._stretches:
            first = self._stretches.popleft()
            if len(first.samples) > count:
                self._stretches.appendleft(Stretch(first.samples[count:], first.arrived))
                first = Stretch(first.samples[:count], first.arrived)
            count -= len(first.samples)
            self._length -= len(first.samples)
            taken.append(first)
        return taken

    def clear(self) -> None:
        self._stretches.clear()
        self._length = 0

    def silence(self) -> None:
        """Replace all samples by silence."""
        count = self._length
        self.clear()
        self.append_silence(count)


def samples_of(stretches: list[Stretch]) -> np.ndarray:
    """All their samples, (n,) int16."""
    return np.concatenate([np.zeros(0, np.int16), *(each.samples for each in stretches)])


def newest(stretches: list[Stretch]) -> float | None:
    """When the newest of them arrived; None if nobody pushed any."""
    times = [each.arrived for each in stretches if each.arrived is not None]
    return max(times, default=None)
