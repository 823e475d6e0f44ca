"""The only way to FFmpeg: every media file of the package is opened here, for reading and for writing.

FFmpeg gets a Python file object and never a path, so no name is a URL, whatever its characters. When it
reads, it may open formats of `FORMATS` only. None of them names other files, and an attempt to open another
file or address is refused. Decoders outside the given list are not used, not even to look at a stream.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Protocol

import av
import av.container

from omniavatar.errors import InputError
from omniavatar.media.media_kinds import FORMATS

MAX_BYTES = 32 * 2**30
MAX_STREAMS = 64
GRACE_S = 30.0
TOLERANT: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""PyAV 19 always accepts tags that are no UTF-8."""
"""Seconds that FFmpeg may work on a file without result."""


class Stopwatch:
    """Counts the seconds spent inside FFmpeg, as a context manager; `check` raises when they are too many.

    `allowed` grows with every result, so that long files get more time than short ones.
    """

    def __init__(self, name: str, allowed: float = GRACE_S) -> None:
        self.name, self.allowed = name, allowed
        self._spent, self._since = 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spent += time.monotonic() - self._since
        self._since = 0.0

    def check(self) -> None:
        """Raises InputError if the limit is exceeded."""
        running = time.monotonic() - self._since if self._since else 0.0
        if self._spent + running > self.allowed:
            raise InputError(
                f"{self.name} keeps the decoder busy for more than {self.allowed:.0f} s without enough sound "
                "or picture; convert it to WAV or MP4 first"
            )


@dataclass(frozen=True)
class MediaFile:
    """A file opened for reading: `name` for messages, and `suffix` by which FFmpeg may guess the format."""

    file: BinaryIO
    name: str
    suffix: str
    size: int

    @property
    def whole(self) -> tuple[range]:
        """The pieces of `open_media` that are the whole file."""
        return (range(self.size),)


class _Pieces:
    """A read-only file object over byte ranges of a file and over given bytes."""

    def __init__(self, source: MediaFile, pieces: Sequence[bytes | range], watch: Stopwatch) -> None:
        # FFmpeg sees this name. It has no character with a meaning in a URL.
        self.name = "input" + (source.suffix if source.suffix[1:].isalnum() else "")
        self._file, self._pieces, self._watch = source.file, pieces, watch
        self._ends = list(accumulate(len(piece) for piece in pieces))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, self._ends[-1])[whence]
        if start + offset < 0:
            raise OSError("seek before the start of the file")
        self._position = start + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        self._watch.check()
        index = bisect_right(self._ends, self._position)
        if index == len(self._ends):
            return b""
        piece = self._pieces[index]
        at = self._position - (self._ends[index] - len(piece))
        left = len(piece) - at
        count = left if count < 0 else min(count, left)
        if isinstance(piece, range):
            self._file.seek(piece.start + at)
            data = self._file.read(count)
        else:
            data = piece[at : at + count]
        self._position += len(data)
        return data


def refuse_other_file(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("a media file must not name other files")


@contextmanager
def open_media(
    source: MediaFile,
    decoders: Sequence[str],
    pieces: Sequence[bytes | range] | None = None,
    watch: Stopwatch | None = None,
    demuxer: str | None = None,
) -> Iterator[av.container.InputContainer]:
    """The container in `source`, or in those `pieces` of it.

    - decoders: names of the codecs that may be decoded.
    - watch: limits the time of all reading; by default that of opening.
    - demuxer: FFmpeg's name of the format; by default it is recognised.

    Raises InputError (a format that is not allowed, too many streams, too slow) and FFmpeg's errors.
    """
    watch = watch or Stopwatch(source.name)
    try:
        with watch:
            container: av.container.InputContainer = av.open(
                _Pieces(source, pieces or source.whole, watch),
                "r",
                demuxer,
                container_options={
                    "format_whitelist": ",".join(FORMATS),
                    "codec_whitelist": ",".join(decoders),
                    "protocol_whitelist": "none",
                    "max_streams": str(MAX_STREAMS + 1),
                },
                io_open=refuse_other_file,
                timeout=(watch.allowed, None),
                **TOLERANT,
            )
    except (av.error.ArgumentError, av.error.PermissionError, PermissionError) as error:
        raise InputError(
            f"{source.name} is in a format that is not opened here (a playlist, a script, a raw or rare "
            "format); convert it to WAV, MP3 or MP4"
        ) from error
    with container:
        if len(container.streams) > MAX_STREAMS:
            raise InputError(f"{source.name} has more than {MAX_STREAMS} streams; export the sound alone")
        yield container


@contextmanager
def own_video(path: Path) -> Iterator[av.container.InputContainer]:
    """An MP4 that this package wrote. Raises OSError and FFmpeg's errors."""
    with path.open("rb") as file:
        media = MediaFile(file, str(path), path.suffix, file.seek(0, 2))
        with open_media(media, ("h264", "aac"), demuxer="mp4") as container:
            yield container


@contextmanager
def new_media(
    target: Path | BytesIO, options: dict[str, str] | None = None
) -> Iterator[av.container.OutputContainer]:
    """A new MP4 in `target`, a path of any name or a buffer; complete when the block ends.

    options: of FFmpeg's MP4 muxer. Raises OSError and FFmpeg's errors.
    """
    if isinstance(target, BytesIO):
        with av.open(target, "w", format="mp4", container_options=options) as container:
            yield container
        return
    with target.open("wb") as file:
        output = _Output(file)

        def reopen(url: str, flags: int, options: dict[str, str]) -> BinaryIO:
            """The same file for reading: `faststart` reads what it wrote."""
            file.flush()
            return target.open("rb")

        try:
            with av.open(output, "w", format="mp4", container_options=options, io_open=reopen) as container:
                yield container
            file.flush()
        except av.error.FFmpegError:
            if output.error is not None:
                raise output.error from None
            raise


def new_stream(target: Appends, form: str, options: dict[str, str]) -> av.container.OutputContainer:
    """A new media file of FFmpeg's format `form` that is written from start to end, without seeking."""
    return av.open(target, "w", format=form, container_options=options, io_open=refuse_other_file)


class Appends(Protocol):
    """What a stream is written to."""

    def write(self, data: bytes) -> int: ...


class _Output:
    """A file for writing whose path FFmpeg does not see. `error` is the first one of the system."""

    name = "output.mp4"

    def __init__(self, file: BinaryIO) -> None:
        self.error: OSError | None = None
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
