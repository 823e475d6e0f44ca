"""Sound for the model (16 kHz mono) and sound for the video (AAC at the original's quality).

Both read the same stream from its first sample, so the model's sound and the viewer's sound are aligned. Mono
is the average of the channels before resampling (as in librosa; it cannot clip), or one channel where the
average cancels. Resampled sound has exactly ceil(samples * new_rate / rate) samples. FFmpeg's swresample
resamples.

The AAC track keeps the source's rate if AAC supports it (8 to 48 kHz). Higher rates become 48 kHz, because
browsers refuse AAC above it; others become the next supported one. It keeps mono, stereo and 5.1 channels;
7.1 becomes 5.1, others stereo. The bit rate is 96 kb/s a channel (192 kb/s for stereo), or AAC's limit. The
file signals the encoder's 1024 samples of priming, so players start at the true first sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from omniavatar.device import free_disk
from omniavatar.errors import OutputError, StoppedError
from omniavatar.media.atomic import atomic_path
from omniavatar.media.audio_source import AudioSource, open_audio
from omniavatar.media.open_file import new_media
from omniavatar.media.resample import resample, resampled_length, silence
from omniavatar.media.sound_check import SoundCheck
from omniavatar.types import Waveform

MODEL_RATE = 16000
AAC_FRAME = 1024
BITS_PER_CHANNEL = 96_000
KEPT_FREE = 64 * 2**20
"""Bytes that decoding leaves free on the disk."""
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_AAC_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 7: "5.1", 8: "5.1"}


@dataclass(frozen=True)
class AudioTrack:
    """Exact counts of a decoded sound. `samples` at `sample_rate` include `lead_samples` of silence.

    notes: what the user should know about the sound, one sentence each.
    """

    samples: int
    sample_rate: int
    lead_samples: int
    source_samples: int
    source_rate: int
    source_channels: int
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> Fraction:
        """Exact seconds of the source itself, without the leading silence."""
        return Fraction(self.source_samples, self.source_rate)


@dataclass(frozen=True)
class AacTrack:
    """An encoded track of exactly `samples` at `sample_rate`; the first `delay_samples` are silence."""

    path: Path
    samples: int
    delay_samples: int
    sample_rate: int
    channels: int
    bit_rate: int


def measure_audio(
    source: str | Path | Waveform, sample_rate: int = MODEL_RATE, lead_silence_s: float = 0.3
) -> AudioTrack:
    """Decode `source` completely and count what `decode_mono` would write; nothing is written."""
    with open_audio(source) as audio:
        check = SoundCheck(audio.sample_rate, audio.channels)
        for _ in check.watched(audio.blocks):
            pass
        return _track(audio, check, sample_rate, round(lead_silence_s * sample_rate))


def decode_mono(
    source: str | Path | Waveform,
    out: str | Path,
    sample_rate: int = MODEL_RATE,
    lead_silence_s: float = 0.3,
) -> AudioTrack:
    """Write `source` to `out` as raw little-endian float32 mono, after `lead_silence_s` of silence.

    Memory does not grow with length; `out` is written completely or not at all. Read it with
    `np.memmap(out, "<f4", "r")`. Raises InputError (source) or OutputError (out).
    """
    lead = round(lead_silence_s * sample_rate)
    with atomic_path(out) as temporary:
        track, channel = _write_mono(source, temporary, sample_rate, lead, None)
        if channel is not None:  # known only after the whole sound was read
            _write_mono(source, temporary, sample_rate, lead, channel)
        return track


def _write_mono(
    source: str | Path | Waveform, path: Path, sample_rate: int, lead: int, channel: int | None
) -> tuple[AudioTrack, int | None]:
    """Write one channel, or the mean of all; also return the channel to use if the mean cancels."""
    with open_audio(source) as audio, path.open("wb") as file:
        room = _Room(path)
        file.write(np.zeros(lead, "<f4").tobytes())
        check = SoundCheck(audio.sample_rate, audio.channels)
        mono = (
            block.mean(axis=0, dtype=np.float32, keepdims=True)
            if channel is None
            else block[channel : channel + 1]
            for block in check.watched(audio.blocks)
        )
        for block in resample(mono, "mono", audio.sample_rate, "mono", sample_rate):
            file.write(block[0].astype("<f4", copy=False).tobytes())
            room.check(file.tell())
        return _track(audio, check, sample_rate, lead), check.loudest_channel


class _Room:
    """Ends the decoding of an endless sound before it fills the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._next = path, KEPT_FREE

    def check(self, written: int) -> None:
        """Raise OutputError if less than `KEPT_FREE` is free; looks once in that many bytes."""
        if written < self._next:
            return
        self._next = written + KEPT_FREE
        if free_disk(self._path.parent) < KEPT_FREE:
            raise OutputError(
                f"cannot write {self._path.parent}: the decoded sound fills the disk after "
                f"{written / 4 / MODEL_RATE / 60:.0f} minutes; free some space or cut the sound"
            )


def _track(audio: AudioSource, check: SoundCheck, sample_rate: int, lead: int) -> AudioTrack:
    total = lead + resampled_length(check.samples, audio.sample_rate, sample_rate)
    notes = check.notes(audio.time_lines)
    return AudioTrack(total, sample_rate, lead, check.samples, audio.sample_rate, audio.channels, notes)


def encode_aac_track(
    source: str | Path | Waveform,
    out: str | Path,
    delay_s: Fraction | float,
    duration_s: Fraction | float,
    should_stop: Callable[[], bool] = lambda: False,
) -> AacTrack:
    """Write `source` as an AAC track (MP4) of exactly `duration_s`, which starts with `delay_s` of silence.

    The sound is cut, or padded with silence, to the duration. Memory does not grow with length. Raises
    InputError (source), OutputError (out), or StoppedError once `should_stop` returns true.
    """
    with open_audio(source) as audio, atomic_path(out) as temporary:
        rate = next((r for r in _AAC_RATES if r >= audio.sample_rate), 48000)
        layout = _AAC_LAYOUTS.get(audio.channels, "stereo")
        delay, total = round(delay_s * rate), round(duration_s * rate)
        if total <= 0:
            raise ValueError(f"duration_s must be positive, not {duration_s}")
        sound = resample(audio.blocks, audio.layout, audio.sample_rate, layout, rate)
        with new_media(temporary) as container:
            stream = container.add_stream("aac", rate=rate, layout=layout)
            context = stream.codec_context
            channels = context.channels
            # AAC holds at most 6144 bits a frame and channel.
            context.bit_rate = channels * min(BITS_PER_CHANNEL, 6144 * rate // AAC_FRAME)
            position = 0
            for block in _fitted(sound, channels, delay, total):
                if should_stop():
                    raise StoppedError("the sound was not encoded to its end")
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", layout)
                frame.sample_rate = rate
                frame.pts, frame.time_base = position, Fraction(1, rate)
                position += block.shape[1]
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            bit_rate = context.bit_rate
        return AacTrack(Path(out), total, delay, rate, channels, bit_rate)


def _fitted(blocks: Iterable[np.ndarray], channels: int, delay: int, total: int) -> Iterator[np.ndarray]:
    """AAC frames (channels, 1024; the last may be shorter): `delay` zeros, the sound, zeros up to `total`."""
    rest = total
    pending = np.zeros((channels, 0), np.float32)
    for block in chain(silence(channels, delay), blocks, silence(channels, total)):
        part = block[:, :rest]
        rest -= part.shape[1]
        pending = np.concatenate([pending, part], axis=1)
        while pending.shape[1] >= AAC_FRAME:
            yield pending[:, :AAC_FRAME]
            pending = pending[:, AAC_FRAME:]
        if not rest:
            break
    if pending.shape[1]:
        yield pending
