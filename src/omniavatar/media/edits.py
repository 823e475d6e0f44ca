"""The edit list of a track of an MP4 or MOV file (ISO/IEC 14496-12, 8.6.6).

FFmpeg follows edit lists by whole frames, and plays other sound where an edit in the middle is empty. The
times of the edits allow to cut at their borders and to keep the empty ones silent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_LARGEST_INDEX = 64 * 2**20
_MOST_EDITS = 10_000


@dataclass(frozen=True)
class Edit:
    """A stretch of the presentation, in seconds from its start."""

    start: float
    end: float
    empty: bool


def track_edits(file: BinaryIO, start: int, size: int, track: int) -> list[Edit]:
    """The edits of the track with this id in the file between `start` and `size`; none if it has no list."""
    index = _index(file, start, size)
    scale = 0
    for kind, body in _boxes(index):
        if kind == b"mvhd" and len(body) >= 24:
            (scale,) = struct.unpack_from(">I", body, 20 if body[0] else 12)
        if kind != b"trak" or not scale:
            continue
        inside = dict(_boxes(body))
        header = inside.get(b"tkhd", b"")
        if len(header) < 24 or struct.unpack_from(">I", header, 20 if header[0] else 12)[0] != track:
            continue
        return _edits(dict(_boxes(inside.get(b"edts", b""))).get(b"elst", b""), scale)
    return []


def _edits(table: bytes, scale: int) -> list[Edit]:
    found: list[Edit] = []
    if len(table) < 8:
        return found
    form = ">QqI" if table[0] else ">IiI"
    entry = struct.calcsize(form)
    count = min(struct.unpack_from(">I", table, 4)[0], _MOST_EDITS, (len(table) - 8) // entry)
    time = 0
    for number in range(count):
        duration, media, _ = struct.unpack_from(form, table, 8 + number * entry)
        found.append(Edit(time / scale, (time + duration) / scale, media == -1))
        time += duration
    return found


def _index(file: BinaryIO, start: int, size: int) -> bytes:
    """The content of the box `moov`, or nothing."""
    position = start
    while position + 16 <= size:
        file.seek(position)
        length, kind, longer = struct.unpack(">I4sQ", file.read(16))
        header = 16 if length == 1 else 8
        length = {0: size - position, 1: longer}.get(length, length)
        if length < header:
            return b""
        if kind == b"moov":
            file.seek(position + header)
            return file.read(min(length - header, _LARGEST_INDEX))
        position += length
    return b""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length < 8:
            return
        yield kind, data[position + 8 : position + length]
        position += length
