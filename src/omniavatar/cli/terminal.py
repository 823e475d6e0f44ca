"""What the commands print on: streams that a lost reader or a full disk cannot break, and safe consoles.

A terminal acts on control sequences, also on those in a file name or a prompt. Everything printed goes
through `say`, `say_json`, a `SafeConsole` or the error lines of `cli.common`, which write them as `\\x1b`.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from omniavatar.text import json_text, printable


def say(text: str) -> None:
    """Print `text` to stdout."""
    typer.echo(printable(text))


def say_json(values: Any) -> None:
    """Print `values` to stdout as indented JSON."""
    typer.echo(json_text(values, indent=2, encoding=getattr(sys.stdout, "encoding", None)))


class SafeConsole(Console):
    """A console that shows control characters in its texts instead of sending them to the terminal."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__(file=file, highlight=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None:
                yield Segment(printable(segment.text), segment.style)
            else:
                yield segment


class Outlet(io.RawIOBase):
    """A file descriptor for writing that never fails: after the first error, everything is dropped.

    lost: the first error.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while self.lost is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program made the terminal non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.lost = error
        return len(memoryview(data))


@contextmanager
def safe_streams() -> Iterator[list[Outlet]]:
    """Write stdout and stderr through an `Outlet` each; yields those of the streams that have a descriptor.

    A descriptor that was closed at the start becomes the null device: the next file that is opened would get
    its number, and then the prints of a library.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    before = sys.stdout, sys.stderr
    outlets = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        outlet = _outlet(name)
        if outlet is not None:
            outlets.append(outlet)
            text = io.TextIOWrapper(
                io.BufferedWriter(outlet),
                encoding=getattr(stream, "encoding", "utf-8"),
                errors="backslashreplace",
                line_buffering=getattr(stream, "line_buffering", True),
            )
            setattr(sys, name, text)
    try:
        yield outlets
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _outlet(name: str) -> Outlet | None:
    """An outlet for a standard stream; None if the stream has no descriptor, as in tests."""
    stream = getattr(sys, name)
    if stream is None:  # closed at the start
        return Outlet({"stdout": 1, "stderr": 2}[name])
    try:
        outlet = Outlet(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return None
    try:
        stream.flush()
    except OSError as error:
        outlet.lost = error
    return outlet


def is_incomplete(outlet: Outlet) -> bool:
    """Whether output is missing that somebody wanted: a reader that left wanted no more."""
    return outlet.lost is not None and outlet.lost.errno != errno.EPIPE
