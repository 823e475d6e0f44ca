"""Transparency of every kind and bit depth is laid on white."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest

from omniavatar.media.image import Reduction, load_image
from png_files import png_file

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
SIDE = 32


def png(depth: int, colour_type: int, samples: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG of (h, w, samples) values; `chunks` go before the pixels."""
    height, width, count = samples.shape
    if depth == 16:
        rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    else:
        bits = np.unpackbits(samples.astype(np.uint8).reshape(height, -1, 1), axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=-1)
    assert rows.shape[1] == -(-width * count * depth // 8)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    return png_file((width, height), depth, colour_type, filtered.tobytes(), **chunks)


def two_colours(left: list[int], right: list[int]) -> np.ndarray:
    samples = np.empty((SIDE, SIDE, len(left)), int)
    samples[:, : SIDE // 2], samples[:, SIDE // 2 :] = left, right
    return samples


def key(*values: int) -> bytes:
    return b"".join(value.to_bytes(2, "big") for value in values)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey(depth: int) -> None:
    clear = 0 if depth == 1 else 2 ** (depth - 1)
    top = 2**depth - 1
    pixels = load_image(png(depth, GREY, two_colours([clear], [clear + 1]), tRNS=key(clear)))
    assert (pixels[:, :16] == 255).all()
    assert (pixels[:, 16:] == round((clear + 1) * 255 / top)).all()


@pytest.mark.parametrize("clear", [(0x1234, 0x1234, 0x1234), (0, 0xFFFF, 0x00FF), (0x0102, 0x0304, 0x0506)])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_transparent_16_bit_colour_is_compared_in_all_bits(
    clear: tuple[int, int, int], channel: int
) -> None:
    near = list(clear)
    near[channel] ^= 1
    pixels = load_image(png(16, RGB, two_colours(list(clear), near), tRNS=key(*clear)))
    assert (pixels[:, :16] == 255).all()
    assert (pixels[:, 16:] == [value >> 8 for value in near]).all()


def test_one_transparent_colour_of_8_bits() -> None:
    content = png(8, RGB, two_colours([10, 20, 30], [10, 20, 31]), tRNS=key(10, 20, 30))
    pixels = load_image(content)
    assert (pixels[:, :16] == 255).all() and (pixels[:, 16:] == [10, 20, 31]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [0, 128])
def test_palettes_with_partial_alpha(depth: int, alpha: int) -> None:
    palette = bytes([200, 0, 0, 0, 0, 200])
    content = png(depth, PALETTE, two_colours([0], [1]), PLTE=palette, tRNS=bytes([alpha]))
    pixels = load_image(content).astype(int)
    expected = np.array([200, 0, 0]) * alpha / 255 + 255 - alpha
    assert np.abs(pixels[:, :16] - expected).max() <= 1
    assert (pixels[:, 16:] == [0, 0, 200]).all()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("colour_type", "colour"), [(GREY_ALPHA, [100]), (RGB_ALPHA, [100, 50, 200])])
def test_alpha_channels(depth: int, colour_type: int, colour: list[int]) -> None:
    scale = 257 if depth == 16 else 1
    half = [value * scale for value in (*colour, 128)]
    clear = [value * scale for value in (*colour, 0)]
    pixels = load_image(png(depth, colour_type, two_colours(half, clear))).astype(int)
    assert np.abs(pixels[:, :16] - (np.array(colour) * 128 / 255 + 127)).max() <= 1
    assert (pixels[:, 16:] == 255).all()


def test_palette_and_alpha_of_a_pil_image() -> None:
    image = PIL.Image.new("PA", (SIDE, SIDE), (3, 0))
    assert (load_image(image) == 255).all()


def test_an_image_of_the_caller_stays_as_it_is() -> None:
    content = png(4, GREY, two_colours([8], [9]), tRNS=key(8))
    image = PIL.Image.open(io.BytesIO(content))
    assert (load_image(image)[:, :16] == 255).all()
    assert image.mode == "L" and image.info["transparency"] == 8


@pytest.mark.parametrize("depth", [4, 8])
def test_a_transparent_grey_in_a_reduced_picture(depth: int) -> None:
    clear, opaque = 2 ** (depth - 1), 2**depth - 1
    content = png(depth, GREY, two_colours([clear], [opaque]), tRNS=key(clear))
    assert (load_image(content, Reduction(above_pixels=100, to_side=16)) == 255).all()


@pytest.mark.parametrize(("bits", "top"), [(12, 4095), (16, 65535)])
def test_deep_grey_tiffs_use_their_whole_range(bits: int, top: int) -> None:
    assert (load_image(grey_tiff(bits, top, photometric=1)) == 255).all()
    middle = load_image(grey_tiff(bits, top // 2 + 1, photometric=1))
    assert (middle == 128).all()


def test_deep_grey_where_white_is_zero() -> None:
    assert (load_image(grey_tiff(16, 0, photometric=0)) == 255).all()
    assert (load_image(grey_tiff(16, 65535, photometric=0)) == 0).all()


def grey_tiff(bits: int, value: int, photometric: int) -> bytes:
    """A little-endian TIFF of 32x32 pixels of one value."""
    number = format(value, f"0{bits}b") * 2
    pair = int(number, 2).to_bytes(bits // 4, "big")
    if bits == 16:
        pair = value.to_bytes(2, "little") * 2
    data = pair * (SIDE * SIDE // 2)
    entries = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: SIDE}
    entries[279] = len(data)
    table = b"".join(
        tag.to_bytes(2, "little") + b"\4\0" + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in sorted(entries.items())
    )
    head = b"II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + table + bytes(4)
    return head.ljust(200, b"\0") + data
