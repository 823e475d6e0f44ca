"""What an audio file's own bytes say about its length, where FFmpeg only guesses.

FFmpeg takes the length of a cut WAV from the size of the file, that of a cut Ogg from its last page, and
that of an MP3 without a Xing header from its first bit rate: each needs a look at the bytes.
Sources: RIFF WAVE (Microsoft), RFC 3533 (Ogg pages), the Xing/Info and VBRI frame headers of MP3.
"""

from __future__ import annotations

import struct
from pathlib import Path

_DECLARED = {"flac", "aiff", "caf", "au", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
_UNKNOWN_RIFF_SIZE = 0x7FFF0000  # written by tools that stream: the size is not known


def promises_length(path: Path, format_name: str) -> bool:
    """Whether the container of this FFmpeg format states the length (rather than FFmpeg guessing it)."""
    if format_name == "mp3":
        return _mp3_has_frame_count(path)
    return format_name in _DECLARED


def missing_tail(path: Path) -> str:
    """Why `path` (WAV or Ogg) ends before it should, or an empty string."""
    with path.open("rb") as file:
        magic = file.read(12)
    if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
        return _wav_missing(path)
    if magic[:4] == b"OggS":
        return _ogg_missing(path)
    return ""


def _wav_missing(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        position = 12
        while position + 8 <= size:
            file.seek(position)
            tag, length = struct.unpack("<4sI", file.read(8))
            if tag == b"data":
                there = size - position - 8
                if length < _UNKNOWN_RIFF_SIZE and there < length:
                    return f"{there} of {length} bytes of sound are there"
                return ""
            position += 8 + length + length % 2
    return "the header is there, the sound is not"


def _ogg_missing(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2 * 65307))  # the largest page is 65307 bytes
        tail = file.read()
    start = tail.rfind(b"OggS")
    page = tail[start:]
    segments = page[26] if start >= 0 and len(page) > 26 else 0
    if not segments or len(page) < 27 + segments or len(page) < 27 + segments + sum(page[27 : 27 + segments]):
        return "its last page is torn"
    return ""


def _mp3_has_frame_count(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(10)
        skip = 0
        if head[:3] == b"ID3":
            a, b, c, d = head[6:10]
            skip = 10 + (a << 21 | b << 14 | c << 7 | d)
        file.seek(skip)
        frame = file.read(2048)
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag)
        if at >= 0 and frame[at + 4 : at + 8] and frame[at + 7] & 1:
            return True
    return b"VBRI" in frame
