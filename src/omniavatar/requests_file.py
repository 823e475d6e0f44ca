"""The input file: one request a line, `prompt@@image@@audio` or `prompt@@image` for a silent video.

Blank lines and lines that begin with `#` are skipped; the file is UTF-8, with or without a byte-order mark.
A path counts from the current directory, and where nothing lies there, from the input file's folder. A
line that cannot be used becomes an `InputError` in its place, so that the others still run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omniavatar.errors import InputError

SEPARATOR = "@@"


@dataclass(frozen=True)
class RequestLine:
    """One line's request: `index` counts requests from 0, `line` counts lines of the file from 1."""

    index: int
    line: int
    prompt: str
    image: Path
    audio: Path | None


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    index: int
    line: int
    error: InputError


def read_requests(path: str | Path) -> list[RequestLine | BadLine]:
    """Requests of the input file in file order.

    Raises InputError when the file itself is missing, is not UTF-8 text, or holds no request.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such input file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    requests: list[RequestLine | BadLine] = []
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if stripped and not stripped.startswith("#"):
            requests.append(_parse(stripped, path, number, len(requests)))
    if not requests:
        raise InputError(f"{path}: holds no request; write lines of prompt{SEPARATOR}image{SEPARATOR}audio")
    return requests


def _parse(line: str, path: Path, number: int, index: int) -> RequestLine | BadLine:
    try:
        return _request(line, path, number, index)
    except InputError as error:
        return BadLine(index, number, error)


def _request(line: str, path: Path, number: int, index: int) -> RequestLine:
    where = f"{path}:{number}"
    parts = [part.strip() for part in line.split(SEPARATOR)]
    if len(parts) > 3:
        raise InputError(f"{where}: {len(parts)} parts; a line is prompt{SEPARATOR}image{SEPARATOR}audio")
    if not parts[0]:
        raise InputError(f"{where}: no prompt before the first {SEPARATOR}; describe the video there")
    if len(parts) < 2 or not parts[1]:
        raise InputError(
            f"{where}: no image; the model needs a portrait, write prompt{SEPARATOR}image{SEPARATOR}audio"
        )
    image = _find(parts[1], "image", path.parent, where)
    audio = _find(parts[2], "audio", path.parent, where) if len(parts) == 3 and parts[2] else None
    return RequestLine(index, number, parts[0], image, audio)


def _find(name: str, kind: str, folder: Path, where: str) -> Path:
    choices = list(dict.fromkeys((Path(name).expanduser(), folder / name)))
    for choice in choices:
        try:
            if choice.is_file():
                return choice
        except (OSError, ValueError):
            break
    raise InputError(f"{where}: {kind} not found: {' or '.join(str(choice) for choice in choices)}")
