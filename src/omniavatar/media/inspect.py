"""Reads the properties and frames of a video file, for tests, tools and the report of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av.container
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from omniavatar.errors import InputError
from omniavatar.media.input_files import open_input
from omniavatar.media.media_kinds import AUDIO_DECODERS, VIDEO_DECODERS
from omniavatar.media.open_file import MediaFile, open_media


@dataclass(frozen=True)
class VideoAudioInfo:
    """The first audio stream of a video: codec name, Hz, channels, seconds."""

    codec: str
    sample_rate: int
    channels: int
    duration_s: float


@dataclass(frozen=True)
class VideoInfo:
    """The first video stream of a file, frames counted packet by packet."""

    frames: int
    fps: Fraction
    width: int
    height: int
    duration_s: float
    audio: VideoAudioInfo | None


def probe_video(path: str | Path) -> VideoInfo:
    """The properties of `path`, frames counted without decoding. Raises InputError."""
    with _opened(Path(path)) as container:
        video = container.streams.video[0]
        rate = video.average_rate or Fraction(0)
        frames = 0
        ends = {stream.index: Fraction(0) for stream in container.streams}
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                frames += packet.stream.index == video.index
                end = (packet.pts + (packet.duration or 0)) * packet.time_base
                ends[packet.stream.index] = max(ends[packet.stream.index], end)
        sound = container.streams.audio[0] if container.streams.audio else None
        info = None
        if sound is not None:
            context = sound.codec_context
            info = VideoAudioInfo(
                context.name, context.sample_rate, context.channels, float(ends[sound.index])
            )
        return VideoInfo(frames, rate, video.width, video.height, float(ends[video.index]), info)


def read_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Decode `path` frame by frame as (H, W, 3) uint8 RGB (BT.709 limited range). Raises InputError."""
    with _opened(Path(path)) as container:
        for frame in container.decode(container.streams.video[0]):
            rgb = frame.reformat(
                format="rgb24",
                src_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            )
            yield rgb.to_ndarray()


def encoding(path: str | Path) -> bytes:
    """What a decoder must know before the first frame (SPS and PPS); parts of one video share it.

    Raises InputError.
    """
    with _opened(Path(path)) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    name = f"video {path}"
    with open_input(path, name) as file:
        media = MediaFile(file, name, path.suffix, file.seek(0, 2))
        try:
            with open_media(media, VIDEO_DECODERS + AUDIO_DECODERS) as container:
                if not container.streams.video:
                    raise InputError(f"{name} has no picture; give a video file")
                yield container
        except av.error.FFmpegError as error:
            raise InputError(f"{name} cannot be read ({error.strerror}); create it again") from error
