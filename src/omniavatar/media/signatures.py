"""Recognises what a file holds from its first bytes, whatever its name says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Literal

from omniavatar.errors import InputError

HEAD_BYTES = 64
"""Number of leading bytes that `content_of` needs."""


@dataclass(frozen=True)
class Content:
    """What a file holds.

    name: the format as users know it.
    reader: Pillow's name of the format; empty if the format is not read.
    """

    kind: Literal["picture", "sound", "video", "document"]
    name: str
    reader: str = ""


_PNG = Content("picture", "PNG", "PNG")
_TIFF = Content("picture", "TIFF", "TIFF")
_AVIF = Content("picture", "AVIF", "AVIF")
_HEIC = Content("picture", "HEIC", "HEIF")
_JPEG_2000 = Content("picture", "JPEG 2000", "JPEG2000")
_PPM = Content("picture", "PPM", "PPM")
_MP4 = Content("video", "MP4")
_POSTSCRIPT = Content("document", "PostScript")
_JUNK_BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"

_STARTS: tuple[tuple[bytes, Content], ...] = (
    (b"\x89PNG\r\n\x1a\n", _PNG),
    (b"\xff\xd8\xff", Content("picture", "JPEG", "JPEG")),
    (b"GIF87a", Content("picture", "GIF", "GIF")),
    (b"GIF89a", Content("picture", "GIF", "GIF")),
    (b"BM", Content("picture", "BMP", "BMP")),
    (b"II*\0", _TIFF),
    (b"MM\0*", _TIFF),
    (b"II+\0", _TIFF),
    (b"MM\0+", _TIFF),
    (b"\0\0\0\x0cjP  \r\n\x87\n", _JPEG_2000),
    (b"\xff\x4f\xff\x51", _JPEG_2000),
    (b"P4", _PPM),
    (b"P5", _PPM),
    (b"P6", _PPM),
    (b"8BPS", Content("picture", "Photoshop")),
    (b"DDS ", Content("picture", "DDS")),
    (b"\xff\x0a", Content("picture", "JPEG XL")),
    (b"\0\0\0\x0cJXL \r\n\x87\n", Content("picture", "JPEG XL")),
    (b"%!PS", _POSTSCRIPT),
    (b"\xc5\xd0\xd3\xc6", _POSTSCRIPT),
    (b"%PDF", Content("document", "PDF")),
    (b"\xd7\xcd\xc6\x9a", Content("document", "WMF")),
    (b"<svg", Content("document", "SVG")),
    (b"ID3", Content("sound", "MP3")),
    (b"fLaC", Content("sound", "FLAC")),
    (b"OggS", Content("sound", "Ogg")),
    (b"#!AMR", Content("sound", "AMR")),
    (b"caff", Content("sound", "CAF")),
    (b".snd", Content("sound", "AU")),
    (b"RF64", Content("sound", "WAV")),
    (b"\x1aE\xdf\xa3", Content("video", "Matroska or WebM")),
    (b"FLV\x01", Content("video", "FLV")),
    (b"\0\0\x01\xba", Content("video", "MPEG")),
)

_CHUNKED: dict[tuple[bytes, bytes], Content] = {
    (b"RIFF", b"WEBP"): Content("picture", "WebP", "WEBP"),
    (b"RIFF", b"WAVE"): Content("sound", "WAV"),
    (b"RIFF", b"AVI "): Content("video", "AVI"),
    (b"FORM", b"AIFF"): Content("sound", "AIFF"),
    (b"FORM", b"AIFC"): Content("sound", "AIFF"),
}
"""Formats whose name stands at byte 8, after the size."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_SOUND_BRANDS = {b"M4A ", b"M4B ", b"F4A "}


def content_of(head: bytes) -> Content | None:
    """What a file holds that starts with `head`; None if it is not recognised."""
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if named := _CHUNKED.get((head[:4], head[8:12])):
        return named
    text = head.lstrip(_JUNK_BEFORE_TEXT)
    for start, content in _STARTS:
        if (text if content.kind == "document" else head).startswith(start):
            return content
    return Content("sound", "MP3 or AAC") if len(head) > 1 and _is_mpeg_audio(*head[:2]) else None


def refuse_picture(file: BinaryIO, name: str) -> None:
    """Raise InputError if `file`, given as sound, holds a picture; it is at its start afterwards."""
    file.seek(0)
    content = content_of(file.read(HEAD_BYTES))
    file.seek(0)
    if content is not None and content.kind == "picture":
        raise InputError(
            f"{name} is a picture ({content.name}), not a sound; "
            "give a sound file (are image and audio swapped?)"
        )


def _is_mpeg_audio(first: int, second: int) -> bool:
    """Whether a frame of AAC (ADTS) or MP3 starts with these bytes, without a tag before it."""
    adts = second & 0xF6 == 0xF0
    layer_2_or_3 = second & 0xE0 == 0xE0 and second & 0x18 != 0x08 and second & 0x06 in (0x02, 0x04)
    return first == 0xFF and (adts or layer_2_or_3)


def _of_brands(head: bytes) -> Content:
    """The kind of an ISO media file; its first box lists the brands it complies with."""
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[8:12], *(head[start : start + 4] for start in range(16, size - 3, 4))}
    if brands & {b"avif", b"avis"}:
        return _AVIF
    if brands & _HEIF_BRANDS:
        return _HEIC
    return Content("sound", "M4A") if brands & _SOUND_BRANDS else _MP4
