"""Text from outside: reads the files it comes in, and prepares it for a terminal or a log.

Only regular files are read, up to a number of bytes. Text is UTF-8. JSON has limits on nesting and on the
size of numbers, each key once, and no NaN. Each problem is one line that names the file and the line in it.

Names, prompts and values may hold terminal control sequences, characters that reverse the reading direction,
halves of a character, or megabytes. Every message, progress display and report is written through here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from omniavatar.errors import InputError, OmniAvatarError

MOST_VALUE = 80
"""Characters of one value in a message."""
MOST_LINE = 4000
"""Characters of one message."""

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_UNSAFE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_BIDI}]")


def _escaped(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def printable(text: str) -> str:
    """`text` with control characters, bidirectional controls and lone surrogates written as `\\x1b`.

    Line ends and tabs stay.
    """
    return _UNSAFE.sub(_escaped, text)


def one_line(text: str) -> str:
    """`text` as one printable line; a very long one loses its middle, so that the remedy at its end stays."""
    if len(text) > 4 * MOST_LINE:  # cut before the costly steps
        text = f"{text[: 2 * MOST_LINE]} {text[-2 * MOST_LINE :]}"
    line = printable(" ".join(text.split()))
    if len(line) <= MOST_LINE:
        return line
    return f"{line[: MOST_LINE * 3 // 4]} ... {line[-MOST_LINE // 4 :]}"


def cut(text: str, most: int = MOST_VALUE) -> str:
    """`text`, or its beginning and `...` if it is longer than `most` characters."""
    return text if len(text) < most else f"{text[: most - 3]}..."


def quoted(value: Any, most: int = MOST_VALUE) -> str:
    """`repr(value)`, cut to about `most` characters."""
    if isinstance(value, str):
        value = value[:most]
    try:
        return cut(repr(value), most)
    except ValueError:  # Python refuses to write whole numbers of many thousand digits
        return "a number of thousands of digits"


def json_text(values: Any, indent: int | None = None, encoding: str | None = "utf-8") -> str:
    """`values` as JSON that is safe on a terminal: what `printable` replaces is a JSON escape.

    encoding: of the stream; characters that it lacks become JSON escapes too.
    """
    text = json.dumps(values, indent=indent, ensure_ascii=False, default=str)
    text = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(values, indent=indent, default=str)
    return text


MOST_DIGITS = 40
"""Characters of a number."""
MOST_RECORD_BYTES = 64_000_000
"""Of a JSON file that the package itself wrote."""
MOST_NESTING = 100
"""Levels of lists and objects in JSON."""

_REMEDIES = {
    "folder": "a folder; give a file",
    "FIFO": "a FIFO, not a regular file; save its content in a file and give that",
}
_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class IrregularFileError(OSError):
    """A path that is no regular file. kind: folder, FIFO, socket, device; empty if it is something else."""

    def __init__(self, path: str | Path, kind: str) -> None:
        super().__init__(errno.EINVAL, f"it is a {kind}" if kind else "it is not a regular file", str(path))
        self.kind = kind


def open_regular(path: str | Path) -> FileIO:
    """The regular file at `path`, open for unbuffered reading. Never waits for one.

    What else lies there is refused before it is opened, and again afterwards if the path changed in between.

    Raises IrregularFileError, another OSError, or ValueError for a text that is no path.
    """
    _refuse_irregular(path, os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_irregular(path, os.fstat(handle).st_mode)
        return FileIO(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _refuse_irregular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise IrregularFileError(path, _KINDS.get(stat.S_IFMT(mode), ""))


def read_bytes(
    path: str | Path,
    most: int,
    error: type[OmniAvatarError],
    missing: str = "no such file; check the path",
) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises `error`."""
    try:
        with BufferedReader(open_regular(path)) as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise error(f"{path}: {missing}") from None
    except IrregularFileError as problem:
        what = f"a {problem.kind}, not a regular file; give a file" if problem.kind else "not a regular file"
        raise error(f"{path}: cannot be read: it is {_REMEDIES.get(problem.kind, what)}") from None
    except OSError as problem_of_system:
        reason = problem_of_system.strerror
        raise error(f"{path}: cannot be read: {reason}; check the path and its permissions") from None
    except ValueError:
        raise error(f"{path}: cannot be read: the name is not a path; check it") from None
    if len(data) > most:
        raise error(f"{path}: cannot be read: it has more than {most:,} bytes; give the right file")
    return data


def read_text(
    path: str | Path,
    most: int,
    error: type[OmniAvatarError],
    missing: str = "no such file; check the path",
) -> str:
    """The text of a regular file of at most `most` bytes, UTF-8 with or without a byte-order mark.

    Control characters other than tab and line end are refused. Raises `error`.
    """
    text = _decoded(path, read_bytes(path, most, error, missing), error)
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise error(f"{path}:{line}: holds the control character {printable(found[0])}; remove it")
    return text


def _decoded(path: str | Path, data: bytes, error: type[OmniAvatarError]) -> str:
    check_encoding(path, data, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        byte = data[problem.start]
        raise error(f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8") from None


def check_encoding(path: str | Path, data: bytes, error: type[OmniAvatarError]) -> None:
    """Raise `error` for a file that begins as UTF-16 or UTF-32."""
    if encoding := _OTHER_ENCODINGS.get(data[:2]):
        raise error(f"{path}: not UTF-8 text but {encoding}; save the file as UTF-8")


def read_json(
    path: str | Path,
    most: int,
    error: type[OmniAvatarError],
    remedy: str,
    missing: str = "no such file; check the path",
) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` with the line and `remedy`."""
    try:
        values = parse_json(_decoded(path, read_bytes(path, most, error, missing), error))
    except JsonError as problem:
        line = f":{problem.line}" if problem.line else ""
        raise error(f"{path}{line}: not valid JSON: {problem}; {remedy}") from None
    if not isinstance(values, dict):
        raise error(f"{path}: must be a JSON object; {remedy}")
    return values


def read_record(path: str | Path, most: int = MOST_RECORD_BYTES) -> dict[str, Any] | None:
    """The object in a JSON file that the package itself wrote; None if it is missing or damaged."""
    try:
        return read_json(path, most, InputError, "it is not used")
    except InputError:
        return None


class JsonError(ValueError):
    """Text that is not JSON, or beyond the limits.

    line: counted from 1; 0 if it is not known.
    """

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


class DeepJsonError(JsonError):
    """JSON that is nested too deeply."""

    def __init__(self) -> None:
        super().__init__(f"nested more than {MOST_NESTING} levels deep")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises JsonError."""
    try:
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except JsonError:
        raise
    except json.JSONDecodeError as problem:
        raise JsonError(problem.msg, problem.lineno) from None
    except RecursionError:
        raise DeepJsonError from None
    if text.count("[") + text.count("{") > MOST_NESTING and _too_deep(value):
        raise DeepJsonError
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise JsonError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise JsonError(f"the number {quoted(digits, 24)} is too large")
    return number


def _constant(name: str) -> Any:
    raise JsonError(f"{name} is not a number in JSON")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"key {quoted(key)} occurs twice")
            seen.add(key)
    return values


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_NESTING):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in level)


def surrogate_problem(text: str) -> str | None:
    """What is wrong with a text that UTF-8 cannot hold, as the end of a sentence; None if nothing is."""
    for position, letter in enumerate(text if _SURROGATE.search(text) else ""):
        if "\udc80" <= letter <= "\udcff":
            return (
                f"holds a byte that is not UTF-8 (0x{ord(letter) - 0xDC00:02x} at character {position + 1})"
            )
        if "\ud800" <= letter <= "\udfff":
            return f"holds half of a character (\\u{ord(letter):04x} at character {position + 1})"
    return None


_SURROGATE = re.compile("[\ud800-\udfff]")
