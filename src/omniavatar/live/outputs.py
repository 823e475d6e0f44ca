"""Where live video goes: a file or pipe that grows, or a folder that players read over HTTP (HLS).

An HLS folder holds `live.m3u8`, `init.mp4` and the newest segments `part_N.m4s`. Any web server can serve it.
Source: RFC 8216.
"""

from __future__ import annotations

import errno
import select
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from omniavatar.errors import OutputError
from omniavatar.live.chunk import LiveChunk
from omniavatar.media.atomic import atomic_write_bytes, translate_os_error
from omniavatar.media.streamed import FragmentSplitter, StreamForm, StreamWriter

LIST, HEAD = "live.m3u8", "init.mp4"
SEGMENT_S = 2.0
KEPT = 8
"""Segments in the list of a running video."""

MakeWriter = Callable[..., StreamWriter]
"""`StreamWriter` with the size, rates and quality of a session."""


class LiveOutput(Protocol):
    """Takes the chunks of a session in order."""

    def add(self, chunk: LiveChunk) -> None: ...

    def finish(self) -> None: ...


class _Frames:
    """Counts frames by the session's clock, so that left-out ones keep their time."""

    def __init__(self) -> None:
        self._next: int | None = None

    def skipped(self, chunk: LiveChunk) -> int:
        first = round(chunk.time * chunk.fps)
        skipped = 0 if self._next is None else first - self._next
        self._next = first + len(chunk.frames)
        return skipped


class GrowingOutput:
    """A file or pipe. name: for messages. Raises OutputError when it cannot be written."""

    def __init__(self, target: BinaryIO, name: str, writer: StreamWriter) -> None:
        self._target, self._name, self._writer, self._frames = target, name, writer, _Frames()

    def add(self, chunk: LiveChunk) -> None:
        """Write a chunk."""
        self._write(self._writer.add(chunk.frames, chunk.audio, self._frames.skipped(chunk)))

    def finish(self) -> None:
        """Write the end of the video."""
        self._write(self._writer.finish())

    def _write(self, data: bytes) -> None:
        try:
            rest = memoryview(data)
            while rest:  # a target without a buffer may take a part only, as a disk that fills up
                written = self._target.write(rest)
                if written is None:  # it does not block, and is full
                    select.select([], [self._target], [])
                else:
                    rest = rest[written:]
            self._target.flush()
        except OSError as error:
            gone = error.errno == errno.EPIPE
            reason = "its reader has gone" if gone else error.strerror
            raise OutputError(f"{self._name}: cannot be written: {reason}; start it again") from None


class HlsOutput:
    """A folder for HLS. The last frame stands where frames were left out, so every segment has its length.

    make_writer: called with `key_s` and `fragment_s`.

    Raises OutputError when it cannot be written.
    """

    def __init__(self, folder: Path, make_writer: MakeWriter) -> None:
        self._folder, self._frames = folder, _Frames()
        with translate_os_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._writer = make_writer(key_s=SEGMENT_S, fragment_s=0)
        self._splitter = FragmentSplitter()
        self._segments: deque[tuple[int, Fraction]] = deque()
        self._count = self._added = self._done = 0
        self._fps = self._writer.fps
        self._newest: np.ndarray | None = None

    def add(self, chunk: LiveChunk) -> None:
        """Add a chunk; a segment appears when the next one begins."""
        self._stand(self._frames.skipped(chunk))
        self._append(chunk.frames, chunk.audio)
        self._newest = chunk.frames[-1].copy()

    def finish(self) -> None:
        """Write the last segment, and mark the list as ended."""
        self._take(self._writer.finish(), ended=True)
        self._write_list(ended=True)

    def _stand(self, frames: int) -> None:
        """Add the last frame, with silence, that many times."""
        rate, second = self._writer.rate, ceil(self._fps)
        for count in (min(second, frames - done) for done in range(0, frames, second)):
            assert self._newest is not None
            sounds = [int((self._added + more) * rate / self._fps) for more in (0, count)]
            still = np.broadcast_to(self._newest, (count, *self._newest.shape))
            self._append(still, np.zeros(sounds[1] - sounds[0], np.int16))

    def _append(self, frames: np.ndarray, sound: np.ndarray) -> None:
        self._added += len(frames)
        self._take(self._writer.add(frames, sound), ended=False)

    def _take(self, data: bytes, ended: bool) -> None:
        fragments = self._splitter.add(data)
        for number, fragment in enumerate(fragments, 1):
            if not self._count:
                atomic_write_bytes(self._folder / HEAD, self._splitter.head)
            atomic_write_bytes(self._segment(self._count), fragment)
            frames = self._added - self._done
            if not ended or number < len(fragments):
                frames = min(frames, self._per_segment)
            self._segments.append((self._count, Fraction(frames) / self._fps))
            self._count, self._done = self._count + 1, self._done + frames
            while len(self._segments) > KEPT:
                old, _ = self._segments.popleft()
                with translate_os_error(self._folder):
                    self._segment(old - 1).unlink(
                        missing_ok=True
                    )  # one more than listed stays for late readers
            self._write_list(ended=False)

    @property
    def _per_segment(self) -> int:
        return max(1, round(SEGMENT_S * self._fps))

    def _segment(self, number: int) -> Path:
        return self._folder / f"part_{number}.m4s"

    def _write_list(self, ended: bool) -> None:
        lines = ["#EXTM3U", "#EXT-X-VERSION:7", "#EXT-X-INDEPENDENT-SEGMENTS"]
        lines += [f"#EXT-X-TARGETDURATION:{round(SEGMENT_S) + 1}"]
        lines += [f"#EXT-X-MEDIA-SEQUENCE:{self._segments[0][0] if self._segments else 0}"]
        lines += [f'#EXT-X-MAP:URI="{HEAD}"']
        for number, seconds in self._segments:
            lines += [f"#EXTINF:{float(seconds):.3f},", self._segment(number).name]
        lines += ["#EXT-X-ENDLIST"] if ended else []
        atomic_write_bytes(self._folder / LIST, "\n".join([*lines, ""]).encode())


def form_of(path: Path) -> StreamForm:
    """The format that a file's name means. Raises OutputError."""
    forms: dict[str, StreamForm] = {".mp4": "mp4", ".ts": "mpegts", ".mpegts": "mpegts"}
    if path.suffix.lower() not in forms:
        raise OutputError(f"{path}: must end in .mp4 or .ts, or be a folder for HLS (end it with /)")
    return forms[path.suffix.lower()]
