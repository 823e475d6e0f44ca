"""Opens files that may come from strangers: regular files only, with a limit, and strict JSON.

A FIFO or a device would block or never end. JSON with repeated names, infinite numbers or deep nesting is
read differently by every program, so it is an error here. Each failure is a CheckpointError of one line.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from omniavatar.errors import CheckpointError, OmniAvatarError

MAX_JSON_BYTES = 16 * 2**20
MAX_SHOWN = 120
DOWNLOAD = "download it again"


def open_regular(path: Path) -> FileIO:
    """The file at `path`, open for unbuffered reading. Raises CheckpointError if it is no readable file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); correct the path") from None
    file = FileIO(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a regular file; give a file on a disk")
    return file


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises CheckpointError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: has {size} bytes, at most {limit} are read; {DOWNLOAD}")
        try:
            return file.readall()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); {DOWNLOAD}") from None


def read_table(path: Path, remedy: str = DOWNLOAD) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises CheckpointError that ends with `remedy`."""
    return parse_table(read_bounded(path, MAX_JSON_BYTES), str(path), remedy)


def parse_table(text: str | bytes, source: str, remedy: str = DOWNLOAD) -> dict[str, Any]:
    """The JSON object in `text`; `source` is its name in a CheckpointError, which ends with `remedy`."""
    try:
        table = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{source}: its JSON is nested too deeply; {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{source}: is not valid JSON ({reason_of(error)}); {remedy}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{source}: must be a JSON object; {remedy}")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shown(text)} is no finite number")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


@contextmanager
def fitting(origin: str, remedy: str) -> Iterator[None]:
    """Raise CheckpointError for any failure to build a model from the shapes or settings in `origin`."""
    try:
        yield
    except OmniAvatarError:
        raise
    except Exception as error:  # shapes from a file reach arithmetic and module constructors
        raise CheckpointError(
            f"{origin}: no model has its sizes ({type(error).__name__}: {reason_of(error)}); {remedy}"
        ) from None


def reason_of(error: BaseException) -> str:
    """The first line of an error's text, short enough to print; else its class."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return shown(lines[0]) if lines else type(error).__name__


def shown(text: str) -> str:
    """`text` from a file as it may be printed: no control characters, and not too long."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[: MAX_SHOWN + 1])
    return plain if len(plain) <= MAX_SHOWN else f"{plain[:MAX_SHOWN]}..."
