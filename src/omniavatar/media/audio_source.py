"""Sound from a file or from memory, as a stream of float32 blocks at its own rate and channels.

The first audio stream of any file that FFmpeg decodes (music, speech, the sound of a video), or a `Waveform`,
is read block by block, so memory does not grow with its length.

Damaged files raise an InputError that names the position. A file is damaged if it ends before the length that
its container states (RIFF sizes, MP4 and FLAC durations, the Xing header of an MP3, an incomplete last MP3
frame or Ogg page), or if a part in the middle cannot be decoded. A file without a stated length is used as
far as it can be decoded. One packet at the very start or end that cannot be decoded (common after careless
cutting) is only logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np

from omniavatar.errors import InputError
from omniavatar.media.containers import missing_tail, promises_length
from omniavatar.media.input_files import open_regular
from omniavatar.media.signatures import refuse_picture
from omniavatar.types import Waveform

WAVEFORM_BLOCK = 65536
MIN_RATE, MAX_RATE = 4000, 768000

_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}

_TAGS = (b"ID3", b"TAG", b"APE")  # between the parts of MP3 files joined end to end

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AudioSource:
    """An opened sound: rate in Hz, FFmpeg layout name, and `blocks` of float32 (channels, samples)."""

    name: str
    sample_rate: int
    channels: int
    layout: str
    codec: str
    blocks: Iterator[np.ndarray]


@contextmanager
def open_audio(source: str | Path | Waveform) -> Iterator[AudioSource]:
    """Open `source` for one pass over its blocks.

    Raises InputError, here or while the blocks are read: the file is missing or damaged, has no sound or no
    samples, or has NaN samples.
    """
    if isinstance(source, Waveform):
        yield _open_waveform(source)
        return
    name = f"audio {source}"
    path = Path(source)
    with open_regular(path, name) as file:
        refuse_picture(file, name)
    tail = missing_tail(path)
    if tail:
        raise InputError(f"{name} is truncated ({tail}); export or download it again")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise InputError(
            f"{name} is not an audio or video file FFmpeg can read, or is damaged; convert it to WAV or MP3"
        ) from error
    with container:
        if not container.streams.audio:
            raise InputError(f"{name} has no sound in it; give a file with an audio stream")
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None or not context.sample_rate or not context.channels:
            raise InputError(f"{name} has sound in a format FFmpeg cannot decode; convert it to WAV or MP3")
        yield AudioSource(
            name=name,
            sample_rate=_checked_rate(name, context.sample_rate),
            channels=context.channels,
            layout=_layout(name, context.channels, context.layout.name),
            codec=context.name,
            blocks=_checked(name, _file_blocks(path, name, container, stream)),
        )


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
            yield np.ascontiguousarray(planar[:, start : start + WAVEFORM_BLOCK], dtype=np.float32)

    return AudioSource(
        name=name,
        sample_rate=_checked_rate(name, int(wave.sample_rate)),
        channels=len(planar),
        layout=_layout(name, len(planar)),
        codec="memory",
        blocks=_checked(name, blocks()),
    )


def _checked(name: str, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield `blocks`; raise InputError for NaN, infinity, and a sound without samples."""
    empty = True
    for block in blocks:
        if not np.isfinite(block).all():
            raise InputError(f"{name} contains NaN or infinite samples; export it again")
        empty = empty and not block.size
        yield block
    if empty:
        raise InputError(f"{name} contains no samples; give a longer file")


def _file_blocks(
    path: Path, name: str, container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[np.ndarray]:
    rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
    declared = _declared_seconds(path, container, stream)
    padded_end = round(declared * rate) if declared and container.format.name.startswith("mov") else None
    decoded = 0
    failed_at: int | None = None
    interleave = av.AudioResampler(format="flt")
    for frame in _decoded_frames(container, stream):
        if frame is None:
            if decoded and failed_at is not None:
                raise _breaks_off(name, failed_at / rate, declared)
            failed_at = decoded
            continue
        if failed_at:
            raise _breaks_off(name, failed_at / rate, declared)
        if frame.sample_rate != rate or len(frame.layout.channels) != channels:
            raise InputError(f"{name} changes its rate or channels midway; convert it to WAV first")
        # PyAV 18.1 reads past the planes of a planar frame of 8 channels, so an interleaved one is made.
        packed = interleave.resample(frame) if frame.format.is_planar and channels >= 8 else [frame]
        block = np.concatenate([_to_float(part) for part in packed], axis=1)
        if padded_end is not None and 0 < decoded + block.shape[1] - padded_end <= 2 * frame.samples:
            block = block[:, : max(0, padded_end - decoded)]  # the padding of the last AAC frames
        decoded += block.shape[1]
        yield block
    if declared is not None and declared - decoded / rate > max(0.1, 0.005 * declared):
        raise _breaks_off(name, decoded / rate, declared)
    if failed_at is not None:
        _log.warning("%s: the packet at %.2f s could not be decoded and is left out", name, failed_at / rate)


def _breaks_off(name: str, at: float, declared: Fraction | None) -> InputError:
    promised = "" if declared is None else f" of {float(declared):.2f} s"
    return InputError(f"{name} is damaged or truncated at {at:.2f} s{promised}; export or download it again")


def _declared_seconds(
    path: Path, container: av.container.InputContainer, stream: av.AudioStream
) -> Fraction | None:
    """Length that the container states for this stream, or None if it is only estimated."""
    if not promises_length(path, container.format.name):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None


def _decoded_frames(
    container: av.container.InputContainer, stream: av.AudioStream
) -> Iterator[av.AudioFrame | None]:
    """Decoded frames in order; None for a packet that could not be decoded or read."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:
            yield None
            return
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            if bytes(packet)[:3] not in _TAGS:
                yield None
            continue
        yield from frames


def _to_float(frame: av.AudioFrame) -> np.ndarray:
    """(channels, samples) float32; full scale of integers becomes [-1, 1)."""
    data: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, len(frame.layout.channels)).T
    if np.issubdtype(data.dtype, np.floating):
        return np.ascontiguousarray(data, dtype=np.float32)
    if data.dtype == np.uint8:
        return (data.astype(np.float32) - 128.0) / 128.0
    return np.ascontiguousarray((data / -float(np.iinfo(data.dtype).min)).astype(np.float32))
