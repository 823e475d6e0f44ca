"""The length that an audio file's bytes state, for formats whose length FFmpeg only guesses.

FFmpeg takes the length of a cut WAV from the size of the file, that of a cut Ogg from its last page, and that
of an MP3 without a Xing header from its first bit rate. So the bytes are read here. An MP3 or Ogg counts as
cut if its last frame or page is incomplete; a cut between two frames or pages cannot be detected.
Sources: RIFF WAVE (Microsoft), RFC 3533 (Ogg pages), ISO/IEC 11172-3 and 13818-3 (MPEG layer III frame
headers), ID3v2, the Xing/Info and VBRI headers of MP3.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_DECLARED = {"flac", "aiff", "caf", "au", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
_UNKNOWN_RIFF_SIZE = 0x7FFF0000  # written by tools that stream: the size is not known

_MPEG1_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2_KBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def promises_length(path: Path, format_name: str) -> bool:
    """Whether the container of this FFmpeg format states the length; else FFmpeg guesses it."""
    if format_name == "mp3":
        return _mp3_has_frame_count(path)
    return format_name in _DECLARED


def missing_tail(path: Path) -> str:
    """Why `path` (WAV, Ogg or MP3) is incomplete, or an empty string."""
    with path.open("rb") as file:
        magic = file.read(12)
    if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
        return _wav_missing(path)
    if magic[:4] == b"OggS":
        return _ogg_missing(path)
    if magic[:3] == b"ID3" or _mp3_frame_length(magic[:4]):
        return _mp3_missing(path)
    return ""


def _wav_missing(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        position = 12
        while position + 8 <= size:
            file.seek(position)
            tag, length = struct.unpack("<4sI", file.read(8))
            if tag == b"data":
                present = size - position - 8
                if length < _UNKNOWN_RIFF_SIZE and present < length:
                    return f"{present} of {length} bytes of sound are present"
                return ""
            position += 8 + length + length % 2
    return "the header is present, the sound is missing"


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


def _mp3_missing(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = 0
        while position + 4 <= len(data):
            length = _id3_length(data[position : position + 10]) or _mp3_frame_length(
                data[position : position + 4]
            )
            if not length:
                return ""  # tags or junk after the sound
            position += length
        return "its last frame is torn" if position > len(data) else ""


def _id3_length(head: bytes) -> int:
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


def _mp3_has_frame_count(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(_id3_length(file.read(10)))
        frame = file.read(2048)
    for tag in (b"Xing", b"Info"):
        at = frame.find(tag)
        if at >= 0 and frame[at + 4 : at + 8] and frame[at + 7] & 1:
            return True
    return b"VBRI" in frame
