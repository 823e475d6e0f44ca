"""Opens files of weights that may come from strangers, and the JSON in them (`omniavatar.text`).

Each failure is a CheckpointError of one line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from omniavatar import text
from omniavatar.errors import CheckpointError, OmniAvatarError

MAX_JSON_BYTES = 16 * 2**20
MAX_SHOWN = 120
DOWNLOAD = "download it again"


def open_weights(path: Path) -> FileIO:
    """The file at `path`, open for unbuffered reading. Raises CheckpointError if it is no readable file."""
    try:
        return text.open_regular(path)
    except text.IrregularFileError:
        raise CheckpointError(f"{path}: is not a regular file; give a file on a disk") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); correct the path") from None


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises CheckpointError."""
    with open_weights(path) as file:
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


def parse_table(data: str | bytes, source: str, remedy: str = DOWNLOAD) -> dict[str, Any]:
    """The JSON object in `data`; `source` is its name in a CheckpointError, which ends with `remedy`."""
    try:
        if isinstance(data, bytes):
            data = data.decode(json.detect_encoding(data))
        table = text.parse_json(data)
    except text.DeepJsonError:
        raise CheckpointError(f"{source}: its JSON is nested too deeply; {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{source}: is not valid JSON ({reason_of(error)}); {remedy}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{source}: must be a JSON object; {remedy}")
    return table


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
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = reason.strip().splitlines()
    return shown(lines[0]) if lines else type(error).__name__


def shown(words: str) -> str:
    """Text from a file as it may be printed: no control characters, and not too long."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in words[: MAX_SHOWN + 1])
    return plain if len(plain) <= MAX_SHOWN else f"{plain[:MAX_SHOWN]}..."
