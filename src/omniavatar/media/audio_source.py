"""Sound from a file or from memory, as a stream of float32 blocks at its own rate and channels.

The first audio stream of any file of `media_kinds.FORMATS` (music, speech, the sound of a video), or a
`Waveform`, is read block by block, so memory does not grow with its length. Files joined end to end are read
one after the other; parts of another rate or layout are resampled to that of the first. Late starts and gaps
in the time stamps are silence (`timeline`).

Damaged files raise an InputError that names the position. A file is damaged if it ends before the length that
its container states (RIFF sizes, MP4 and FLAC durations, the Xing header of an MP3, an incomplete last MP3
frame or Ogg page), or if a part in the middle cannot be decoded. A file without a stated length is used as
far as it can be decoded. One packet at the very start or end that cannot be decoded (common after careless
cutting) is only logged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av.error
import numpy as np

from omniavatar.errors import InputError
from omniavatar.media.audio_part import MAX_HOURS, PartReader, too_long
from omniavatar.media.containers import missing_tail
from omniavatar.media.input_files import open_input
from omniavatar.media.media_kinds import AUDIO_DECODERS
from omniavatar.media.open_file import MAX_BYTES, MediaFile, Stopwatch, open_media
from omniavatar.media.parts import Pieces, sound_parts
from omniavatar.media.resample import WAVEFORM_BLOCK, resample
from omniavatar.media.signatures import refuse_picture
from omniavatar.media.timeline import TimeLine
from omniavatar.types import Waveform

MIN_RATE, MAX_RATE = 4000, 768000
MOST_PARTS = 10_000
LOUDEST = 64.0
"""Samples beyond this are not float sound, whose full scale is 1."""

_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


@dataclass(frozen=True, eq=False)
class AudioSource:
    """An opened sound: rate in Hz, FFmpeg layout name, and `blocks` of float32 (channels, samples).

    `time_lines` has an entry for each part of a file that was read so far.
    """

    name: str
    sample_rate: int
    channels: int
    layout: str
    codec: str
    blocks: Iterator[np.ndarray]
    time_lines: list[TimeLine] = field(default_factory=list)


@contextmanager
def open_audio(source: str | Path | Waveform) -> Iterator[AudioSource]:
    """Open `source` for one pass over its blocks.

    Raises InputError, here or while the blocks are read: the file is missing or damaged, has no sound or no
    samples, has samples that are not float sound, or exceeds a limit.
    """
    if isinstance(source, Waveform):
        yield _open_waveform(source)
        return
    name = f"audio {source}"
    with ExitStack() as stack:
        file = stack.enter_context(open_input(source, name))
        refuse_picture(file, name)
        size = file.seek(0, 2)
        if size > MAX_BYTES:
            raise InputError(f"{name} has more than {MAX_BYTES >> 30} GiB; export its sound alone")
        found = sound_parts(file, size, MAX_HOURS * 3600)
        missing = found.missing or missing_tail(file)
        if missing:
            raise InputError(f"{name} is truncated ({missing}); export or download it again")
        if len(found.parts) > MOST_PARTS:
            raise InputError(f"{name} has more than {MOST_PARTS} joined files in it; convert it to WAV first")
        media = MediaFile(file, name, Path(source).suffix, size)
        watch = Stopwatch(name)
        first = stack.enter_context(_part(media, found.parts[0], watch))
        context = first.stream.codec_context
        layout = _layout(name, context.channels, context.layout.name)
        rate = _checked_rate(name, context.sample_rate)
        time_lines = [first.time_line]

        def blocks() -> Iterator[np.ndarray]:
            yield from first
            for pieces in found.parts[1:]:
                with _part(media, pieces, watch) as reader:
                    time_lines.append(reader.time_line)
                    yield from _adapted(name, reader, layout, rate)

        yield AudioSource(
            name=name,
            sample_rate=rate,
            channels=context.channels,
            layout=layout,
            codec=context.name,
            blocks=_checked(name, rate, blocks()),
            time_lines=time_lines,
        )


@contextmanager
def _part(media: MediaFile, pieces: Pieces, watch: Stopwatch) -> Iterator[PartReader]:
    with ExitStack() as stack:
        try:
            container = stack.enter_context(open_media(media, AUDIO_DECODERS, pieces, watch))
        except av.error.FFmpegError as error:
            raise InputError(
                f"{media.name} is not an audio or video file FFmpeg can read, or is damaged; "
                "convert it to WAV or MP3"
            ) from error
        offset = pieces[0].start if isinstance(pieces[0], range) else 0
        yield PartReader.of(media, container, watch, offset)


def _adapted(name: str, reader: PartReader, layout: str, rate: int) -> Iterator[np.ndarray]:
    """The blocks of a later part in the layout and at the rate of the first. Mono keeps its level."""
    context = reader.stream.codec_context
    own_rate = _checked_rate(name, context.sample_rate)
    given = _layout(name, context.channels, context.layout.name)
    blocks = iter(reader)
    if given != layout and layout == "mono":
        blocks, given = (block.mean(axis=0, dtype=np.float32, keepdims=True) for block in blocks), layout
    elif (given, layout) == ("mono", "stereo"):
        blocks, given = (np.repeat(block, 2, axis=0) for block in blocks), layout
    yield from resample(blocks, given, own_rate, layout, rate)


def _layout(name: str, channels: int, given: str = "") -> str:
    """The layout that FFmpeg reports, else the usual layout for this number of channels."""
    if given and "channels" not in given:
        return given
    if channels not in _LAYOUTS:
        raise InputError(f"{name} has {channels} channels in no known layout; mix it to stereo first")
    return _LAYOUTS[channels]


def _checked_rate(name: str, rate: int) -> int:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InputError(f"{name} has a sample rate of {rate} Hz; give {MIN_RATE} to {MAX_RATE} Hz")
    return rate


def _open_waveform(wave: Waveform) -> AudioSource:
    name = "the waveform"
    samples = np.asarray(wave.samples)
    if samples.ndim not in (1, 2) or not np.issubdtype(samples.dtype, np.floating):
        raise InputError(
            f"{name} is {samples.dtype} of shape {samples.shape}; "
            "give floats (samples,) or (samples, channels)"
        )
    planar = samples[None] if samples.ndim == 1 else samples.T

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, planar.shape[1], WAVEFORM_BLOCK):
            with np.errstate(over="ignore"):  # `_checked` reports infinity
                block = np.ascontiguousarray(planar[:, start : start + WAVEFORM_BLOCK], dtype=np.float32)
            yield block

    return AudioSource(
        name=name,
        sample_rate=_checked_rate(name, int(wave.sample_rate)),
        channels=len(planar),
        layout=_layout(name, len(planar)),
        codec="memory",
        blocks=_checked(name, int(wave.sample_rate), blocks()),
    )


def _checked(name: str, rate: int, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `blocks`; raise InputError for samples that are not float sound, too many samples, and none."""
    count = 0
    for block in blocks:
        # One pass for both: the peak of a block with NaN is NaN.
        peak = float(np.abs(block).max(initial=0.0))
        if not np.isfinite(peak):
            raise InputError(f"{name} contains NaN or infinite samples; export it again")
        if peak > LOUDEST:
            raise InputError(
                f"{name} has samples up to {peak:.3g}, and full scale of float samples is 1; divide integers "
                "stored as floats by their full scale (32768 for 16 bits), or export it again"
            )
        count += block.shape[1]
        if count > MAX_HOURS * 3600 * rate:
            raise too_long(name, count / rate)
        yield block
    if not count:
        raise InputError(f"{name} contains no samples; give a longer file")
