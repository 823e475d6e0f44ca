"""Makes ICC profiles of version 2: RGB by primaries and gamma, grey by gamma, CMYK by corners."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
D65 = (0.3127, 0.3290)

Corner = tuple[int, int, int, int]
Primaries = tuple[tuple[float, float], ...]


def rgb_profile(primaries: Primaries, curve: float | np.ndarray) -> bytes:
    """A profile with three primaries (x, y) and white D65; `curve`: a gamma, or samples of linear light."""
    to_xyz = _bradford() @ rgb_to_xyz(primaries)
    tags = {b"wtpt": _xyz(D50)}
    for i, letter in enumerate(b"rgb"):
        tags[bytes([letter]) + b"XYZ"] = _xyz(to_xyz[:, i])
        tags[bytes([letter]) + b"TRC"] = _curve(curve)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": _curve(gamma)})


def cmyk_profile(lightness: Mapping[Corner, float], otherwise: float) -> bytes:
    """A profile that makes grey of lightness L* (0..100) from each corner (0 or 1 of C, M, Y, K)."""
    corners = [
        lightness.get((c, m, y, k), otherwise) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
    ]
    cube = b"".join(bytes([round(value * 255 / 100), 128, 128]) for value in corners)
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + cube
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": table + bytes(range(256)) * 3})


def srgb_light(levels: np.ndarray) -> np.ndarray:
    """Linear light 0..1 of sRGB levels 0..1."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def rgb_to_xyz(primaries: Primaries) -> np.ndarray:
    """The matrix from linear RGB with white D65 to XYZ."""
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T
    x, y = D65
    return columns * np.linalg.solve(columns, [x / y, 1.0, (1 - x - y) / y])


def in_srgb(rgb: tuple[int, int, int], primaries: Primaries, gamma: float) -> np.ndarray:
    """The colour `rgb` of a profile as sRGB levels 0..255, by the formulas of the standards."""
    light = np.linalg.solve(rgb_to_xyz(SRGB), rgb_to_xyz(primaries) @ (np.array(rgb) / 255) ** gamma)
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def _bradford() -> np.ndarray:
    """The adaptation from D65 to D50."""
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    x, y = D65
    gains = (cones @ D50) / (cones @ [x / y, 1.0, (1 - x - y) / y])
    return np.linalg.inv(cones) @ np.diag(gains) @ cones


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: np.ndarray | tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


def _curve(curve: float | np.ndarray) -> bytes:
    if isinstance(curve, np.ndarray):
        samples = np.rint(curve * 65535).astype(">u2")
        return b"curv\0\0\0\0" + struct.pack(">I", len(samples)) + samples.tobytes()
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(curve * 256))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    content = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", **tags}
    offset, table, body = 128 + 4 + 12 * len(content), b"", b""
    for name, data in content.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"none", 0x02100000, kind, space, connection)
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(_fixed(value) for value in D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(content)) + table + body
