"""Splits a sound file into the parts that FFmpeg reads one by one.

FFmpeg stops at the end of the first file where several were joined end to end, as streaming speech servers
send them. So the joints are found here: the next header of the same format. A WAV may also have several data
chunks, more sound than its header states, or an impossible size because the writer did not know it.
Sources: RIFF WAVE (Microsoft), EBU Tech 3306 (RF64), RFC 3533 (Ogg pages and chains), RFC 9559 (Matroska),
ISO/IEC 14496-12 (MP4 boxes), and the descriptions of the other formats by their makers.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from omniavatar.media.chunks import CHUNKED, chunked_part
from omniavatar.media.containers import id3_length
from omniavatar.media.riff import wav_parts

Pieces = tuple["bytes | range", ...]
"""A part: byte ranges of the file, and bytes that replace a header."""

_BLOCK = 1 << 20
_LONGEST = 80
"""Bytes that the patterns below may span."""

_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_STARTS = {
    b"fLaC": rb"fLaC[\x00\x80]\x00\x00\x22",
    b"#!AM": rb"#!AMR(-WB)?\n",
    b"TTA1": rb"TTA1[\x01\x02]\x00",
    b"caff": rb"caff\x00\x01\x00\x00desc",
    b"FORM": rb"FORM.{4}AIF[FC]",
    b".snd": rb"\.snd\x00\x00.{6}\x00\x00\x00[\x01-\x1d]\x00[\x00-\x0b]..\x00\x00\x00[\x01-\x08]",
    b"riff": re.escape(_W64),
    b"FLV\x01": rb"FLV\x01[\x01\x04\x05]\x00\x00\x00\x09\x00{4}",
    b"nut/": rb"nut/multimedia container\x00",
    b".RMF": rb"\.RMF\x00\x00\x00[\x10\x12]\x00[\x00\x01]",
    b"\xb7\xd8\x00\x20": rb"\xb7\xd8\x00\x20\x37\x49\xda\x11\xa6\x4e\x00\x07\xe9\x5e\xad\x8d",
    b"Crea": rb"Creative Voice File\x1a",
    b".SoX": rb"\.SoX.{4}.{8}.{8}.{4}",
    b"d\xa3\x01\x00": rb"d\xa3\x01\x00.{4}[\x01-\x08]\x00\x00\x00[\x01-\x08]\x00[\x00-\x04]\x00",
    # A first block (flag 0x800) whose samples start at zero.
    b"wvpk": rb"wvpk.{4}..\x00.{5}\x00{4}.{4}.[%s]" % re.escape(bytes(b for b in range(256) if b & 8)),
    b"\x1aE\xdf\xa3": rb"\x1aE\xdf\xa3.{1,40}\x42\x82[\x84\x88](webm|matroska)",
}


@dataclass(frozen=True)
class SoundParts:
    """The parts of a file in order, and why its last one is incomplete, or an empty string."""

    parts: tuple[Pieces, ...]
    missing: str = ""


def sound_parts(file: BinaryIO, size: int, most_seconds: float) -> SoundParts:
    """How to read a sound file of `size` bytes.

    most_seconds: a WAV header that states more, and more than the file holds, is not believed.
    """
    file.seek(0)
    magic = file.read(12)
    if magic[:4] in (b"RIFF", b"RF64", b"BW64") and magic[8:12] == b"WAVE":
        parts, missing = wav_parts(file, size, most_seconds, lambda a, b: _next_start(file, _WAV, a, b))
        return SoundParts(tuple(parts), missing)
    if magic[:4] == b"OggS":
        starts = list(_ogg_starts(file, size))
    elif magic[4:8] == b"ftyp":
        starts = list(_mp4_starts(file, size))
    elif magic[:3] == b"ID3" or magic[:2] in (
        b"\xff\xfb",
        b"\xff\xfa",
        b"\xff\xf3",
        b"\xff\xf2",
        b"\xff\xe3",
    ):
        starts = list(_mp3_starts(file, size, id3_length(magic)))
    elif magic[:4] in _STARTS:
        starts = list(_repeated(file, _STARTS[magic[:4]], size))
    else:
        starts = [0]
    ranges = [range(start, end) for start, end in zip(starts, [*starts[1:], size], strict=True)]
    if magic[:4] not in CHUNKED:
        return SoundParts(tuple((part,) for part in ranges))
    found = [chunked_part(file, part) for part in ranges]
    return SoundParts(tuple(pieces for pieces, _ in found), next((why for _, why in found if why), ""))


_MP3_INFO = rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xef].(?:\x00{32}|\x00{17}|\x00{9})(?:Xing|Info)\x00"
_WAV = rb"(RIFF|RF64|BW64).{4}WAVE(fmt |JUNK|bext|ds64|LIST)"


def _next_start(file: BinaryIO, pattern: bytes, start: int, end: int) -> int | None:
    """Position of the first match between `start` and `end`."""
    expression = re.compile(pattern, re.DOTALL)
    position, kept = start, b""
    file.seek(start)
    while position < end:
        block = file.read(min(_BLOCK, end - position))
        if not block:
            return None
        window = kept + block
        found = expression.search(window)
        if found:
            return position - len(kept) + found.start()
        position += len(block)
        kept = window[-_LONGEST:]
    return None


def _repeated(file: BinaryIO, pattern: bytes, size: int) -> Iterator[int]:
    found: int | None = 0
    while found is not None:
        yield found
        found = _next_start(file, pattern, found + 4, size)


def _mp3_starts(file: BinaryIO, size: int, first_frame: int) -> Iterator[int]:
    """Starts of joined MP3 files: a frame with a Xing or Info header that is not the first frame.

    FFmpeg would decode that frame, and the padding around it, as sound.
    """
    yield 0
    for found in _repeated(file, _MP3_INFO, size):
        if found > first_frame + 1:
            yield found


def _ogg_starts(file: BinaryIO, size: int) -> Iterator[int]:
    """Starts of the links of an Ogg chain: the first page of a stream after pages with content."""
    yield 0
    position, content = 0, False
    while position + 27 <= size:
        file.seek(position)
        page = file.read(27 + 255)
        if page[:4] != b"OggS":
            return
        first = bool(page[5] & 2)
        if first and content:
            yield position
        content = not first
        table = page[27 : 27 + page[26]]
        position += 27 + len(table) + sum(table)


def _mp4_starts(file: BinaryIO, size: int) -> Iterator[int]:
    """Starts of the files in joined MP4 files: a file type box after an index."""
    position, indexed = 0, False
    while position + 16 <= size:
        file.seek(position)
        length, kind, longer = struct.unpack(">I4sQ", file.read(16))
        if kind == b"ftyp" and (indexed or not position):
            yield position
            indexed = False
        indexed = indexed or kind == b"moov"
        length = longer if length == 1 else length
        if length < 8:
            return
        position += length
