"""Frames in memory to a video file, and back, for programs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar.errors import ConfigError, InputError, OutputError
from omniavatar.media.atomic import translate_os_error
from omniavatar.media.audio import encode_aac_track
from omniavatar.media.inspect import read_frames
from omniavatar.media.video import GrowingVideo, encode_segment

if TYPE_CHECKING:
    from omniavatar.types import LocalAudio

SEGMENT_FRAMES = 250
"""Frames that are encoded together; the encoder's output for them is in memory."""
THREADS = 4
"""Of x264; the same as in a video of the engine."""
Frames = Any
"""Types of numpy, torch and PIL, which are not imported for this."""


def frames_to_video(
    frames: Frames,
    path: str | Path,
    fps: float = 25,
    sound: LocalAudio | None = None,
    crf: float = 18,
    preset: str = "medium",
) -> Path:
    """Write frames as an MP4 video (H.264, yuv420p, BT.709) with the encoder of the engine; returns `path`.

    The file is written completely or not at all, and replaces an existing one. Memory does not grow with the
    length if `frames` is a generator.

    - frames: an array or tensor (N, H, W, 3), or an iterable of such blocks, of frames (H, W, 3), or of PIL
      images. Values are uint8 in [0, 255] or floats in [0, 1]. H and W are even.
    - fps: frames a second, such as 25 or 29.97.
    - sound: a sound file or a `Waveform`; it begins with the first frame and is cut, or filled with silence,
      to the length of the picture.
    - crf, preset: quality and speed of H.264, as in the configuration.

    Raises InputError for frames or sound that cannot be used, OutputError if the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise OutputError(f"{path}: the video is written as .mp4; give the path that ending")
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction) or not 1 <= fps <= 240:
        raise InputError(f"fps: must be a number from 1 to 240; got {fps}")
    rate = Fraction(fps).limit_denominator(1001)
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder does not exist; create it first")
    pictures = _pictures(frames)
    with translate_os_error(path), tempfile.TemporaryDirectory(prefix=".frames-", dir=path.parent) as name:
        folder = Path(name)
        segments = _encode(pictures, folder, rate, crf, preset)
        count = sum(number for _, number in segments)
        track = None
        if sound is not None:
            track = folder / "sound.mp4"
            encode_aac_track(sound, track, Fraction(0), count / rate)
        with GrowingVideo(folder / "growing.mp4", path, rate, track) as video:
            for segment, _ in segments:
                video.append(segment)
            return video.finish(folder=folder)


def video_to_frames(path: str | Path, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
    """Yield the frames of a video file one by one, each (H, W, 3) uint8 RGB.

    - start: number of the first frame; frames before it are decoded and dropped.
    - count: the most frames to yield; None: to the end.

    `np.stack(list(video_to_frames(path)))` is the array (N, H, W, 3). Raises InputError if the file is no
    video or has no frame number `start`.
    """
    if start < 0 or (count is not None and count < 0):
        raise InputError(f"video {path}: start {start} and count {count} must not be negative")
    found = read_frames(path)
    skipped = sum(1 for _ in islice(found, start))
    first = next(found, None)
    if first is None:
        raise InputError(f"video {path}: has {skipped} frames; start must be below that, not {start}")
    if count is None or count > 0:
        yield first
    yield from islice(found, None if count is None else max(count - 1, 0))


def _encode(
    pictures: Iterator[np.ndarray], folder: Path, fps: Fraction, crf: float, preset: str
) -> list[tuple[Path, int]]:
    """Segments of at most `SEGMENT_FRAMES` frames, with their number of frames."""
    segments: list[tuple[Path, int]] = []
    for first in pictures:
        block = (frame[None] for frame in chain([first], islice(pictures, SEGMENT_FRAMES - 1)))
        segment, size = folder / f"segment_{len(segments):05d}.mp4", (first.shape[0], first.shape[1])
        try:
            segments.append((segment, encode_segment(block, segment, fps, size, crf, preset, THREADS)))
        except ConfigError as error:
            raise InputError(str(error)) from None
    if not segments:
        raise InputError("frames: are none; give at least one")
    return segments


def _pictures(frames: Frames) -> Iterator[np.ndarray]:
    """Every frame as (H, W, 3) uint8, all of one even size. Raises InputError."""
    if isinstance(frames, str | bytes | Path) or not hasattr(frames, "__iter__"):
        raise InputError(
            f"frames: are of type {type(frames).__name__}; give an array (N, H, W, 3), or images in order"
        )
    size: tuple[int, int] | None = None
    for number, frame in enumerate(chain.from_iterable(map(_block, _parts(frames)))):
        height, width = frame.shape[:2]
        if size is None and (height % 2 or width % 2):
            raise InputError(
                f"frames: are {width}x{height}; H.264 needs an even width and height, crop or pad them"
            )
        size = size or (height, width)
        if size != (height, width):
            raise InputError(
                f"frames: number {number} is {width}x{height}, the first is {size[1]}x{size[0]}; "
                "give all the same size"
            )
        yield _bytes(frame, number)


def _parts(frames: Frames) -> Iterable[Any]:
    """Frames, or blocks of frames."""
    return [frames] if getattr(frames, "ndim", None) == 4 else frames


def _block(part: Any) -> np.ndarray:
    """A frame or a block of frames as an array (n, H, W, 3) of its own type. Raises InputError."""
    if hasattr(part, "detach"):  # a tensor of torch
        part = part.detach().cpu()
        part = (part.float() if part.is_floating_point() else part).numpy()
    elif hasattr(part, "convert"):  # an image of PIL
        part = part.convert("RGB")
    array = np.asarray(part)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] != 3 or not array.shape[1] or not array.shape[2]:
        turn = "; the channels come last, as of frames.permute(0, 2, 3, 1)" if 3 in array.shape[:2] else ""
        raise InputError(f"frames: one has the shape {tuple(np.shape(part))}, not (H, W, 3){turn}")
    return array


def _bytes(frame: np.ndarray, number: int) -> np.ndarray:
    """A frame as uint8. Raises InputError for other values than the two kinds."""
    if frame.dtype == np.uint8:
        return frame
    if not np.issubdtype(frame.dtype, np.floating):
        raise InputError(f"frames: are {frame.dtype}; give uint8 from 0 to 255, or floats from 0 to 1")
    low, high = float(frame.min()), float(frame.max())
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"frames: number {number} has values from {low:g} to {high:g}; floats go from 0 to 1, "
            "clip them or give uint8"
        )
    return np.rint(frame * 255.0).astype(np.uint8)
