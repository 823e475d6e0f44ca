"""Rows of a CSV text, where one bad row never takes the next ones with it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

MOST_OPEN_QUOTES = 100
"""Quotes without an end after which the rest of a text is not searched for further rows."""
_OPEN = "a quote has no end; close it, or double the quotes inside of a cell"


def csv_rows(text: str) -> list[tuple[int, list[str] | str]]:
    """Every row of a CSV text, the header included: its last line, and its cells or what is wrong with it.

    A cell may hold line ends inside quotes, and may be as long as the text. If a quote has no end, its line
    is an error, and the next line begins another row.
    """
    lines = list(io.StringIO(text, newline=""))
    found: list[tuple[int, list[str] | str]] = []
    before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        start, opened = 0, 0
        while start < len(lines):
            begun = _read(lines, start, found)
            if begun is None:
                return found
            start, opened = begun + 1, opened + 1
            found.append((start, _OPEN))
            if opened == MOST_OPEN_QUOTES:
                found.append((start + 1, f"{opened} quotes before this line have no end; close them"))
                return found
    finally:
        csv.field_size_limit(before)
    return found


def _read(lines: Sequence[str], start: int, found: list[tuple[int, list[str] | str]]) -> int | None:
    """Append the rows from line `start` on; returns the line of a quote without an end, None without one."""
    rows = csv.reader(lines[start:])
    begun = start
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return None
        except csv.Error as error:
            found.append((start + rows.line_num, f"not valid CSV ({error}); check the quotes"))
        else:
            ended = start + rows.line_num
            if ended == len(lines) and _is_open(lines[begun:]):
                return begun
            found.append((ended, row))
        begun = start + rows.line_num


def _is_open(lines: Sequence[str]) -> bool:
    """Whether the lines of one row end inside quotes."""
    try:
        list(csv.reader(lines, strict=True))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False
