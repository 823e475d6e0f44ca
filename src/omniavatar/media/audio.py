"""Sound for the model (16 kHz mono) and sound for the video (AAC at the original's quality).

Both read the same stream from its first sample, so the model's sound and the viewer's sound are aligned. Mono
is the average of the channels before resampling (as in librosa; it cannot clip). Resampled sound has exactly
ceil(samples * new_rate / rate) samples. FFmpeg's swresample resamples.

The AAC track keeps the source's rate if AAC supports it (8 to 96 kHz). Higher rates become 48 kHz, others the
next supported one. It keeps mono, stereo and 5.1 channels; 7.1 becomes 5.1, others stereo. The bit rate is 96
kb/s a channel (192 kb/s for stereo), or AAC's limit if that is less. The file signals the encoder's 1024
samples of priming, so players start at the true first sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np

from omniavatar.media.atomic import atomic_path
from omniavatar.media.audio_source import WAVEFORM_BLOCK, open_audio
from omniavatar.types import Waveform

MODEL_RATE = 16000
AAC_FRAME = 1024
BITS_PER_CHANNEL = 96_000
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 7: "5.1", 8: "5.1"}


@dataclass(frozen=True)
class AudioTrack:
    """Exact counts of a decoded sound. `samples` at `sample_rate` include `lead_samples` of silence."""

    samples: int
    sample_rate: int
    lead_samples: int
    source_samples: int
    source_rate: int
    source_channels: int

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
        count = sum(block.shape[1] for block in audio.blocks)
        lead = round(lead_silence_s * sample_rate)
        total = lead + _resampled_length(count, audio.sample_rate, sample_rate)
        return AudioTrack(total, sample_rate, lead, count, audio.sample_rate, audio.channels)


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
    with open_audio(source) as audio, atomic_path(out) as temporary, temporary.open("wb") as file:
        file.write(np.zeros(lead, "<f4").tobytes())
        counted = _Counter(audio.blocks)
        mono = (block.mean(axis=0, dtype=np.float32, keepdims=True) for block in counted)
        for block in _resample(mono, "mono", audio.sample_rate, "mono", sample_rate):
            file.write(block[0].astype("<f4", copy=False).tobytes())
        total = lead + _resampled_length(counted.samples, audio.sample_rate, sample_rate)
        return AudioTrack(total, sample_rate, lead, counted.samples, audio.sample_rate, audio.channels)


def encode_aac_track(
    source: str | Path | Waveform, out: str | Path, delay_s: Fraction | float, duration_s: Fraction | float
) -> AacTrack:
    """Write `source` as an AAC track (MP4) of exactly `duration_s`, which starts with `delay_s` of silence.

    The sound is cut, or padded with silence, to the duration. Memory does not grow with length. Raises
    InputError (source) or OutputError (out).
    """
    with open_audio(source) as audio, atomic_path(out) as temporary:
        rate = next((r for r in _AAC_RATES if r >= audio.sample_rate), 48000)
        layout = _AAC_LAYOUTS.get(audio.channels, "stereo")
        delay, total = round(delay_s * rate), round(duration_s * rate)
        if total <= 0:
            raise ValueError(f"duration_s must be positive, not {duration_s}")
        sound = _resample(audio.blocks, audio.layout, audio.sample_rate, layout, rate)
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=rate, layout=layout)
            context = stream.codec_context
            channels = context.channels
            # AAC holds at most 6144 bits a frame and channel.
            context.bit_rate = channels * min(BITS_PER_CHANNEL, 6144 * rate // AAC_FRAME)
            position = 0
            for block in _fitted(sound, channels, delay, total):
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", layout)
                frame.sample_rate = rate
                frame.pts, frame.time_base = position, Fraction(1, rate)
                position += block.shape[1]
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            bit_rate = context.bit_rate
        return AacTrack(Path(out), total, delay, rate, channels, bit_rate)


class _Counter:
    """Iterates over blocks (channels, samples) and counts the samples."""

    def __init__(self, blocks: Iterator[np.ndarray]) -> None:
        self._blocks = blocks
        self.samples = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self._blocks:
            self.samples += block.shape[1]
            yield block


def _resampled_length(samples: int, rate: int, new_rate: int) -> int:
    return -(-samples * new_rate // rate)


def _frame(block: np.ndarray, layout: str, rate: int) -> av.AudioFrame:
    """An interleaved float frame of (channels, samples): PyAV 18.1 cannot make a planar one of 8 channels."""
    interleaved = np.ascontiguousarray(block.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
    frame.sample_rate = rate
    return frame


def _resample(
    blocks: Iterable[np.ndarray], layout: str, rate: int, new_layout: str, new_rate: int
) -> Iterator[np.ndarray]:
    """Blocks at the new rate and layout, with exactly `_resampled_length` samples in total."""
    if (layout, rate) == (new_layout, new_rate):
        yield from blocks
        return
    resampler = av.AudioResampler(format="fltp", layout=new_layout, rate=new_rate)
    read = written = 0
    for block in blocks:
        read += block.shape[1]
        frames = resampler.resample(_frame(block, layout, rate)) if block.shape[1] else []
        for frame in frames:
            data = frame.to_ndarray()
            written += data.shape[1]
            yield data
    missing = _resampled_length(read, rate, new_rate) - written
    for frame in resampler.resample(None) if read else []:
        data = frame.to_ndarray()[:, : max(0, missing)]
        missing -= data.shape[1]
        yield data
    yield from _zeros(len(av.AudioLayout(new_layout).channels), missing)


def _zeros(channels: int, samples: int) -> Iterator[np.ndarray]:
    for start in range(0, samples, WAVEFORM_BLOCK):
        yield np.zeros((channels, min(WAVEFORM_BLOCK, samples - start)), np.float32)


def _fitted(blocks: Iterable[np.ndarray], channels: int, delay: int, total: int) -> Iterator[np.ndarray]:
    """AAC frames (channels, 1024; the last may be shorter): `delay` zeros, the sound, zeros up to `total`."""
    rest = total
    pending = np.zeros((channels, 0), np.float32)
    for block in chain(_zeros(channels, delay), blocks, _zeros(channels, total)):
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
