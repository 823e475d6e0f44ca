"""The length that an audio file's bytes state, for formats whose length FFmpeg only guesses.

FFmpeg takes the length of a cut Ogg from its last page, and that of an MP3 without a Xing header from its
first bit rate. So the bytes are read here. `riff` does it for WAV. An MP3 or Ogg counts as
cut if its last frame or page is incomplete; a cut between two frames or pages cannot be detected.
Sources: RFC 3533 (Ogg pages), ISO/IEC 11172-3 and 13818-3 (MPEG layer III frame
headers), ID3v2, the Xing/Info and VBRI headers of MP3.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_DECLARED = {"flac", "aiff", "caf", "au", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
_MOST_FRAMES = 2_000_000  # over twelve hours of MP3

_MPEG1_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def promises_length(file: BinaryIO, format_name: str) -> bool:
    """Whether the container of this FFmpeg format states the length; else FFmpeg guesses it."""
    if format_name == "mp3":
        return _mp3_has_frame_count(file)
    return format_name in _DECLARED


def missing_tail(source: Path | BinaryIO) -> str:
    """Why an Ogg or MP3 file is incomplete, or an empty string."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return missing_tail(file)
    size = source.seek(0, 2)
    source.seek(0)
    magic = source.read(4)
    if magic == b"OggS":
        return _ogg_missing(source, size)
    if magic[:3] == b"ID3" or _mp3_frame_length(magic):
        return _mp3_missing(source, size)
    return ""


def _ogg_missing(file: BinaryIO, size: int) -> str:
    file.seek(max(0, size - 2 * 65307))  # the largest page is 65307 bytes
    tail = file.read(2 * 65307)
    start = tail.rfind(b"OggS")
    page = tail[start:]
    segments = page[26] if start >= 0 and len(page) > 26 else 0
    if not segments or len(page) < 27 + segments or len(page) < 27 + segments + sum(page[27 : 27 + segments]):
        return "its last page is torn"
    return ""


def _mp3_missing(file: BinaryIO, size: int) -> str:
    position = block_start = 0
    block = b""
    for _ in range(_MOST_FRAMES):
        if position + 4 > size:
            break
        if not block_start <= position <= block_start + len(block) - 10:
            file.seek(position)
            block_start, block = position, file.read(1 << 16)
        head = block[position - block_start : position - block_start + 10]
        length = id3_length(head) or _mp3_frame_length(head[:4])
        if not length:
            return ""  # tags or junk after the sound
        position += length
    return "its last frame is torn" if position > size else ""


def id3_length(head: bytes) -> int:
    """Bytes of the ID3v2 tag that starts with `head` (10 bytes), or 0 if none starts."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    a, b, c, d = head[6:10]
    return 10 + (a << 21 | b << 14 | c << 7 | d)


def _mp3_frame_length(head: bytes) -> int:
    """Bytes of the layer III frame that starts with `head` (4 bytes), or 0 if none starts."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:
        return 0
    version, rate_index, rate_kind = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or rate_index in (0, 15) or rate_kind == 3:
        return 0
    first = version == 3  # MPEG 1; 2 is MPEG 2, 0 is MPEG 2.5
    kbits = (_MPEG1_KBITS if first else _MPEG2_KBITS)[rate_index - 1]
    rate = (44100, 48000, 32000)[rate_kind] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if first else 72) * kbits * 1000 // rate + (head[2] >> 1 & 1)


def _mp3_has_frame_count(file: BinaryIO) -> bool:
    file.seek(0)
    file.seek(id3_length(file.read(10)))
    frame = file.read(2048)
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag)
        if at >= 0 and frame[at + 4 : at + 8] and frame[at + 7] & 1:
            return True
    return b"VBRI" in frame
