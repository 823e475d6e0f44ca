"""One H.264 encoder that goes on over several segments, so that only the first of them has a key frame.

A key frame at every window is a visible step: its errors have nothing in common with those of the frame
before it, which has been refined by many frames. Here the segments of some seconds share an encoder. It has
no B-frames and looks at no later frame, so a segment holds the packets of exactly its frames and is complete
when its last frame went in. What it loses: up to a fifth more bytes in lively videos, fewer in still ones.

The state of x264 cannot be stored. So the pictures since the key frame are kept beside the segments, without
loss, and a resumed run encodes them again (`replay`). The bytes are the same: no thread decides anything.

Limits: x264 only (`H264Encoder.goes_on`); the segments of an encoder are encoded one after the other.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import av.error
import numpy as np
from av.codec.context import Flags

from omniavatar.media.atomic import atomic_write_bytes
from omniavatar.media.h264 import ENCODERS, encoder_options
from omniavatar.media.open_file import new_media, own_video
from omniavatar.media.video import encoded_file, h264_stream, rgb_frames, set_up, yuv_picture

SLICES = {2**18: 8, 2**17: 4}
"""Slices of a picture by its least pixels, each encoded by a thread. Eight cost 1 to 2 % more bytes than four
and take 0.7 of their time on 16 cores. In a small picture, four would cost up to a fifth of the bytes."""
LOSSLESS = encoder_options("x264", 0, "ultrafast")


class RunningEncoder:
    """An encoder whose first segment begins with a key frame. The others need the segments before them.

    - size: (H, W), both even.
    """

    def __init__(
        self, fps: Fraction, size: tuple[int, int], crf: float, preset: str, encoder: str = "x264"
    ) -> None:
        backend = ENCODERS.get(encoder)
        if backend.goes_on is None:
            raise ValueError(f"{encoder} cannot go on after a segment")
        self._fps, self._size, self._encoder = fps, size, encoder
        self._options = encoder_options(encoder, crf, preset) | dict(backend.goes_on)
        self._threads = next((count for least, count in SLICES.items() if size[0] * size[1] >= least), 1)
        self._context = cast(av.VideoCodecContext, av.CodecContext.create(backend.codec, "w"))
        set_up(self._context, fps, size, dict(self._options), self._threads)
        self._context.framerate = fps
        self._context.flags |= Flags.global_header
        self._frames = 0

    def write(self, pictures: Sequence[av.VideoFrame], path: Path) -> int:
        """Encode what `yuv_pictures` gave as the next segment; returns the number of frames.

        The file is written completely or not at all. Raises OutputError.
        """
        atomic_write_bytes(path, self._segment(pictures))
        return len(pictures)

    def replay(self, kept: Path, segment: Path) -> bool:
        """Encode the pictures of a segment again; returns whether the bytes are those of `segment`."""
        try:
            pictures = list(_pictures(kept))
            return self._segment(pictures) == segment.read_bytes()
        except (av.error.FFmpegError, OSError, ValueError):
            return False

    def _segment(self, pictures: Iterable[av.VideoFrame]) -> bytes:
        buffer, start = io.BytesIO(), self._frames
        with new_media(buffer) as container:
            stream = h264_stream(
                container, self._fps, self._size, dict(self._options), self._threads, self._encoder
            )
            for picture in pictures:
                picture.pts, picture.time_base = self._frames, 1 / self._fps
                self._frames += 1
                for packet in self._context.encode(picture):
                    packet.stream, packet.time_base, packet.duration = stream, 1 / self._fps, 1
                    packet.pts = packet.dts = (packet.pts or 0) - start
                    container.mux(packet)
        if self._frames == start:
            raise ValueError("a segment needs at least one frame")
        return buffer.getvalue()


def yuv_pictures(frames: Iterable[np.ndarray], size: tuple[int, int]) -> list[av.VideoFrame]:
    """Blocks of frames (n, H, W, 3) uint8 RGB as `RunningEncoder.write` takes them."""
    return [yuv_picture(rgb) for rgb in rgb_frames(frames, size)]


def keep(pictures: Sequence[av.VideoFrame], path: Path, fps: Fraction, size: tuple[int, int]) -> None:
    """Write the pictures of a segment without loss, for `replay`. Raises OutputError."""
    atomic_write_bytes(path, encoded_file(pictures, fps, size, LOSSLESS, 1)[0])


def _pictures(path: Path) -> Iterator[av.VideoFrame]:
    """The pictures of a file, without what the decoder knows of them."""
    with own_video(path) as container:
        for frame in container.decode(video=0):
            yield av.VideoFrame.from_ndarray(frame.to_ndarray(), format="yuv420p")


def begins_with_key_frame(segment: Path) -> bool:
    """Whether a segment can be decoded without those before it. Raises OSError and FFmpeg's errors."""
    with own_video(segment) as container:
        packet = next(iter(container.demux(video=0)), None)
        return packet is not None and bool(packet.is_keyframe)


def packet_count(segment: Path) -> int:
    """Frames of a segment, without decoding them. Raises OSError and FFmpeg's errors."""
    with own_video(segment) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))
