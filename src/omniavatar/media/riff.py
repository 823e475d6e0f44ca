"""The parts of a WAV file: joined files, several data chunks, and sizes that are wrong or unknown."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

_STREAMED = 0x7FFF0000  # this size and more: the writer did not know it
_LEAST_EXTRA = 1024
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LIST", b"id3 ", b"LYRICS")
_UNKNOWN = 0xFFFFFFFF


@dataclass
class _Riff:
    """One RIFF file: where it starts, its first data chunk header, and its ranges of samples."""

    start: int
    header: int | None = None
    data: list[range] = field(default_factory=list)
    rewrite: bool = False

    def pieces(self, file: BinaryIO, end: int) -> tuple[bytes | range, ...]:
        if not self.rewrite or self.header is None:
            return (range(self.start, end),)
        total = sum(len(piece) for piece in self.data)
        file.seek(self.start)
        head: tuple[bytes | range, ...] = (range(self.start, self.header),)
        if file.read(4) != b"RIFF":  # the sizes of RF64 lie in another chunk
            head = (b"RIFF" + struct.pack("<I", _UNKNOWN) + b"WAVE", range(self.start + 12, self.header))
        return (*head, b"data" + struct.pack("<I", min(total, _UNKNOWN)), *self.data)


def wav_parts(
    file: BinaryIO, size: int, most_seconds: float, next_file: Callable[[int, int], int | None]
) -> tuple[list[tuple[bytes | range, ...]], str]:
    """Pieces of every WAV file in `file`, and why the last one is incomplete, or an empty string.

    next_file: position of the next WAV header between two positions.
    """
    parts: list[tuple[bytes | range, ...]] = []
    start, missing = 0, ""
    while start < size and not missing:
        end, part, missing = _walk(file, start, size, most_seconds, next_file)
        parts.append(part.pieces(file, end))
        start = end
    return parts, missing


def _walk(
    file: BinaryIO, start: int, size: int, most_seconds: float, next_file: Callable[[int, int], int | None]
) -> tuple[int, _Riff, str]:
    """The end of the WAV file at `start`, its content, and what is missing."""
    part = _Riff(start)
    position = start + 12
    rate = 0
    long_data: int | None = None
    while position + 8 <= size:
        file.seek(position)
        head = file.read(36)
        tag, length = struct.unpack_from("<4sI", head)
        body = position + 8
        if tag in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
            return position, part, "" if part.data else _NO_SOUND
        if tag == b"fmt " and len(head) >= 20:
            (rate,) = struct.unpack_from("<I", head, 16)
        if tag == b"ds64" and len(head) >= 24:
            (long_data,) = struct.unpack_from("<Q", head, 16)
        if tag == b"data":
            if length == _UNKNOWN and long_data:
                length = long_data
            part.header = position if part.header is None else part.header
            present = size - body
            # A header without a size: the sound goes on to the next file, or to the end.
            if present and (not length or (length > present and _unknown(length, rate, most_seconds))):
                end = next_file(body, size) or size
                part.data.append(range(body, end))
                part.rewrite = part.rewrite or len(part.data) > 1
                return end, part, ""
            if length > present:
                return size, part, f"{present} of {length} bytes of sound are present"
            part.data.append(range(body, body + length))
            part.rewrite = part.rewrite or len(part.data) > 1
        elif part.data and not _is_chunk(tag, body, length, size):
            end = next_file(position, size) or size
            if is_sound(file, position, end):
                part.data[-1] = range(part.data[-1].start, end)
                part.rewrite = True
            return end, part, ""
        # Some writers leave out the padding byte of an odd chunk.
        position = body + length
        file.seek(position)
        position += length % 2 if file.read(4) not in (b"RIFF", b"LIST", b"data") else 0
    return size, part, "" if part.data else _NO_SOUND


_NO_SOUND = "the header is present, the sound is missing"


def _unknown(length: int, bytes_a_second: int, most_seconds: float) -> bool:
    """Whether a size that the file does not hold means "unknown" and not "cut"."""
    if length >= _STREAMED or (bytes_a_second and length / bytes_a_second > most_seconds):
        return True
    power = 1 << length.bit_length() - 1
    near_power = min(length - power, 2 * power - length) <= 64
    return length >= 10**8 and (length % 10**8 == 0 or near_power)


def _is_chunk(tag: bytes, body: int, length: int, size: int) -> bool:
    return all(32 <= byte < 127 for byte in tag) and body + length <= size


def is_sound(file: BinaryIO, start: int, end: int) -> bool:
    """Whether the bytes after the stated end of the sound are more of it: neither tags nor zeros, nor few."""
    if end - start < _LEAST_EXTRA:
        return False
    file.seek(start)
    block = file.read(8)
    if block.startswith(_TAGS):
        return False
    file.seek(start)
    while file.tell() < end:
        block = file.read(min(1 << 20, end - file.tell()))
        if not block:
            return False
        if block.strip(b"\0"):
            return True
    return False
