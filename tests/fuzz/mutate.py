"""Damaged copies of good files.

Bytes are flipped, set to edge values, cut, repeated, moved, or mixed with another file. Text has its numbers,
keys and punctuation replaced by hostile ones. The same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence

MOST_BYTES = 4_000_000
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1)
HOSTILE = (
    "-1", "0", "1e999", "-1e308", "nan", "NaN", "Infinity", ".inf", "9" * 400, "0x10", "12:30", "1_000",
    "010", "2001-01-01", "true", "null", "~", "~nosuch/x.png", "", " ", "\0", "\x1b]0;x\x07", "\u202e",
    "\ud83d", "é" * 300, "x" * 70_000, "[" * 300, "{" * 300, "*a", "&a [*a]", "<<: *a",
    "!!python/object:os.system x", "../../etc/passwd", "/dev/zero", "http://127.0.0.1:9/x",
    "concat:a|b", "**/*", "@@", '"', ",", "\r\n", "- ",
)  # fmt: skip
_TOKEN = re.compile(r"[\w.+-]+|[^\w\s]")

Change = Callable[[random.Random, bytes, bytes], bytes]


def _flip(dice: random.Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8, 64))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _edge(dice: random.Random, data: bytes, _: bytes) -> bytes:
    """An edge value as a whole number of 1 to 8 bytes, near the front where headers are."""
    size, value = dice.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q"))), dice.choice(EDGES)
    width, code = size
    packed = struct.pack(dice.choice("<>") + code, value % 256**width)
    reach = len(data) if dice.random() < 0.3 else min(len(data), 512)
    place = dice.randrange(max(1, reach))
    return data[:place] + packed + data[place + width :]


def _cut(dice: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: dice.randrange(len(data))]


def _drop(dice: random.Random, data: bytes, _: bytes) -> bytes:
    first, last = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[last:]


def _repeat(dice: random.Random, data: bytes, _: bytes) -> bytes:
    first, last = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return data[:last] + data[first:last] * dice.choice((1, 2, 40)) + data[last:]


def _noise(dice: random.Random, data: bytes, _: bytes) -> bytes:
    place = dice.randrange(len(data))
    noise = dice.randbytes(dice.choice((4, 64, 1024)))
    return data[:place] + noise + data[place + (len(noise) if dice.random() < 0.5 else 0) :]


def _mix(dice: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: dice.randrange(len(data))] + other[dice.randrange(len(other)) :]


def _token(dice: random.Random, data: bytes, _: bytes) -> bytes:
    """Some words, numbers or signs of a text replaced by hostile ones."""
    text = data.decode("utf-8", "surrogateescape")
    for _ in range(dice.choice((1, 1, 2, 5))):
        places = list(_TOKEN.finditer(text[:20_000]))
        if not places:
            break
        place = dice.choice(places)
        text = text[: place.start()] + dice.choice(HOSTILE) + text[place.end() :]
    return text.encode("utf-8", "surrogatepass" if "\ud83d" in text else "surrogateescape")


BINARY: tuple[Change, ...] = (_flip, _flip, _edge, _edge, _cut, _drop, _repeat, _noise, _mix)
TEXT: tuple[Change, ...] = (_token, _token, _token, *BINARY)


def mutated(dice: random.Random, good: Sequence[bytes], text: bool) -> bytes:
    """A damaged copy of one of the `good` contents, of at most `MOST_BYTES` bytes."""
    data = dice.choice(good)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        data = dice.choice(TEXT if text else BINARY)(dice, data, dice.choice(good) or b"\0")
    return data[:MOST_BYTES]
