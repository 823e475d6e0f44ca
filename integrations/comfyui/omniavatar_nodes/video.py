"""VIDEO from a finished file, and a few of its frames, without the others in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import torch
from comfy_api.input_impl import VideoFromFile

from .inputs import InputProblem

MEGABYTE = 1_000_000


class FinishedVideo(VideoFromFile):  # type: ignore[misc]
    """A VIDEO that reads from its file when a node asks for frames."""

    def __init__(self, path: Path) -> None:
        super().__init__(file=str(path))
        self.path = path


def path_of(video: Any) -> Path:
    """The file of a VIDEO. Raises InputProblem if it has no own one or the file is gone."""
    source = video.path if isinstance(video, FinishedVideo) else None
    if source is None and hasattr(video, "get_stream_source"):
        source = video.get_stream_source()
    trimmed = getattr(video, "get_active_trim_window", None)
    if trimmed is not None and any(trimmed()):
        raise InputProblem("video: is cut from a longer one; save it as a file first")
    if not isinstance(source, str | Path):
        raise InputProblem("video: lies in memory; save it first, or connect a node that gives a file")
    path = Path(source)
    if not path.is_file():
        raise InputProblem(f"video: {path} does not exist any more; queue the node that makes it again")
    return path


def read_frames(path: Path, start: int) -> Iterator[np.ndarray]:
    """Frames from number `start` on, (H, W, 3) uint8 RGB; decoding begins at the key frame before it."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise InputProblem(f"video: {path} has no picture")
        stream = container.streams.video[0]
        rate, unit = stream.average_rate, stream.time_base
        if rate is None or unit is None:
            raise InputProblem(f"video: {path} does not say its frame rate; save it as MP4 first")
        begin = stream.start_time or 0
        if start:
            container.seek(begin + int(start / rate / unit), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts is not None and round((frame.pts - begin) * unit * rate) >= start:
                yield frame.to_ndarray(format="rgb24")


def last_frame(paths: tuple[Path, ...], number: int) -> np.ndarray | None:
    """Frame `number` of the first of the files that has it: one may have got another name meanwhile."""
    for path in paths:
        try:
            return next(read_frames(path, number))
        except (FileNotFoundError, StopIteration):
            continue
    return None


def frames(path: Path, start: int, count: int, most_megabytes: int) -> torch.Tensor:
    """An IMAGE (n, H, W, 3) of `count` frames from number `start` on; fewer at the end of the video.

    Raises InputProblem if the video has no such frame, or the frames take more than `most_megabytes`.
    """
    try:
        found = read_frames(path, start)
        first = next(found, None)
    except av.error.FFmpegError as error:
        raise InputProblem(f"video: {path} cannot be read ({error.strerror}); make it again") from None
    if first is None:
        raise InputProblem(f"start: {path.name} ends before frame {start}; give a smaller number")
    fit = most_megabytes * MEGABYTE // (first.size * 4)
    if count > fit:
        raise InputProblem(
            f"count: {count} frames of {first.shape[1]}x{first.shape[0]} take "
            f"{count * first.size * 4 / MEGABYTE:.0f} MB as IMAGE; {fit} fit into {most_megabytes} MB, "
            "take fewer or raise most_megabytes"
        )
    images = torch.empty((count, *first.shape), dtype=torch.float32)
    images[0] = torch.from_numpy(first)
    taken = 1
    if count > 1:
        for frame in found:
            images[taken] = torch.from_numpy(frame)
            taken += 1
            if taken == count:
                break
    found.close()
    return images[:taken].div_(255.0)
