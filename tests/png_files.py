"""Writes PNG files that Pillow cannot write."""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png_file(size: tuple[int, int], depth: int, colour_type: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of (width, height); `rows` start with their filter byte, `chunks` go before them."""
    header = b"".join(side.to_bytes(4, "big") for side in size) + bytes([depth, colour_type, 0, 0, 0])
    before = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    body = chunk(b"IDAT", zlib.compress(rows))
    return SIGNATURE + chunk(b"IHDR", header) + before + body + chunk(b"IEND", b"")
