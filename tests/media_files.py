"""Makes sounds, pictures and frames for the media tests."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from omniavatar.media.video import encode_segment

FPS = Fraction(25)
SIZE = (96, 128)
CHANNELS = {"mono": 1, "stereo": 2, "5.1": 6, "7.1": 8}


def tones(seconds: float, rate: int, channels: int) -> np.ndarray:
    """A sine with a different frequency in each channel: (channels, samples) float32."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.3 * np.sin(2 * np.pi * (200 + 60 * c) * time) for c in range(channels)]).astype("f4")


def write_audio(
    path: Path,
    samples: np.ndarray,
    rate: int,
    codec: str,
    layout: str,
    options: dict[str, str] | None = None,
    moved: Callable[[float], float | None] = lambda time: time,
) -> Path:
    """Write planar float32 (channels, samples) with PyAV; the suffix selects the container.

    moved: the new time stamp of a packet in seconds, or None to leave the packet out.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if codec in ("vorbis", "opus"):
            stream.codec_context.options = {"strict": "-2"}
        formats = stream.codec_context.codec.audio_formats
        assert formats
        size = 1024
        convert = av.AudioResampler(format=formats[0], layout=layout, rate=rate, frame_size=size)
        interleaved = np.ascontiguousarray(samples.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in [*convert.resample(frame), *convert.resample(None), None]:
            for packet in stream.encode(piece):
                time = None if packet.pts is None else float(packet.pts * packet.time_base)
                new = None if time is None else moved(time)
                if time is not None and new is None:
                    continue
                if time is not None and new is not None and new != time:
                    packet.pts = packet.dts = packet.pts + round((new - time) / packet.time_base)
                container.mux(packet)
    return path


def read_audio(path: Path) -> tuple[np.ndarray, int, Fraction]:
    """Decoded sound of a video: (channels, samples), rate, and the time of its first sample."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    first = frames[0]
    return (
        np.concatenate([frame.to_ndarray() for frame in frames], axis=1),
        first.sample_rate,
        first.pts * first.time_base,
    )


def pictures(start: int, count: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frames (count, H, W, 3) uint8; the grey level and a moving bar show the frame number."""
    height, width = size
    frames = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        frames[i] = 20 + (start + i) * 2 % 200
        frames[i, : height // 4, (start + i) * 3 % width] = 255
    return frames


def segments(folder: Path, lengths: list[int]) -> list[Path]:
    """Segment files of these lengths, with consecutively numbered frames."""
    paths, start = [], 0
    for index, length in enumerate(lengths):
        path = folder / f"segment_{index:05d}.mp4"
        assert encode_segment([pictures(start, length)], path, FPS, SIZE, preset="veryfast") == length
        paths.append(path)
        start += length
    return paths
