"""The sound chunk of AIFF, CAF and W64 files whose stated size is wrong or unknown.

Sources: Audio Interchange File Format 1.3 and Core Audio Format (Apple), Sony Wave64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from omniavatar.media.riff import is_sound

_LARGEST_32 = 0x7FFF0000


@dataclass(frozen=True)
class _Kind:
    """How chunks look: where the first starts, their tag and size fields, and the tag of the sound.

    - counted: bytes of the chunk's header that its size includes.
    - align: chunks start at multiples of this.
    """

    first: int
    tag_bytes: int
    form: str
    sound: bytes
    counted: int
    align: int


_KINDS = {
    b"FORM": _Kind(12, 4, ">I", b"SSND", 0, 2),
    b"caff": _Kind(8, 4, ">Q", b"data", 0, 1),
    b"riff": _Kind(40, 16, "<Q", b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a", 24, 8),
}
CHUNKED = tuple(_KINDS)


def chunked_part(file: BinaryIO, part: range) -> tuple[tuple[bytes | range, ...], str]:
    """Pieces of an AIFF, CAF or W64 file in `part`, and why it is incomplete, or an empty string."""
    file.seek(part.start)
    kind = _KINDS[file.read(4)]
    size_bytes = struct.calcsize(kind.form)
    header = kind.tag_bytes + size_bytes
    position, frames_at = part.start + kind.first, None
    while position + header <= part.stop:
        file.seek(position)
        tag = file.read(kind.tag_bytes)
        (stated,) = struct.unpack(kind.form, file.read(size_bytes))
        body = position + header
        length = stated - kind.counted
        if tag == b"COMM":
            frames_at = body + 2
        if tag == kind.sound:
            present = part.stop - body
            unknown = length <= 0 or length >= (1 << 62 if size_bytes == 8 else _LARGEST_32)
            if not unknown and length > present:
                return (part,), f"{present} of {length} bytes of sound are present"
            end = body + length + -length % kind.align
            if not unknown and (_is_chunk(file, kind, end, part.stop) or not is_sound(file, end, part.stop)):
                return (part,), ""
            size = struct.pack(kind.form, present + kind.counted)
            sound = (range(part.start, body - size_bytes), size, range(body, part.stop))
            if frames_at is None or not unknown:
                return sound, ""
            # A frame count of zero: FFmpeg takes it from the size.
            head = (range(part.start, frames_at), bytes(4), range(frames_at + 4, body - size_bytes))
            return (*head, *sound[1:]), ""
        if length < 0:
            break
        position = body + length + -length % kind.align
    return (part,), ""


def _is_chunk(file: BinaryIO, kind: _Kind, position: int, stop: int) -> bool:
    if position >= stop:
        return True
    file.seek(position)
    head = file.read(kind.tag_bytes + struct.calcsize(kind.form))
    if len(head) < kind.tag_bytes + struct.calcsize(kind.form):
        return False
    (length,) = struct.unpack_from(kind.form, head, kind.tag_bytes)
    return all(32 <= byte < 127 for byte in head[:4]) and position + length <= stop
