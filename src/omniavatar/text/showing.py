"""Prepares text from outside for a terminal or a log.

Names, prompts and values may hold terminal control sequences, characters that reverse the reading direction,
halves of a character, or megabytes. Every message, progress display and report is written through here.
"""

from __future__ import annotations

import json
import re
from typing import Any

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
