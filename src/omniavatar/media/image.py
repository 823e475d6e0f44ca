"""A picture from a file or from memory, as RGB bytes.

The EXIF rotation is applied, the embedded colour profile is converted to sRGB, and transparency becomes
white. The first frame of an animation is used, which is logged (a PIL image: its current frame). CMYK, grey,
palette and 16-bit pictures become 8-bit RGB.

`picture_file` opens the files and has the limits. A picture above 40 megapixels is reduced by a whole factor
during or right after decoding, to at least 2880 pixels on its shorter side, so that 100 megapixels need
little memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import PIL.Image

from omniavatar.errors import InputError
from omniavatar.media.colour import lab_to_srgb, to_srgb
from omniavatar.media.picture_file import (
    Stored,
    check_size,
    decode,
    decode_opened,
    is_deep,
    open_file,
    upright,
)


@dataclass(frozen=True)
class Reduction:
    """Images of more than `above_pixels` are reduced until their shorter side is about `to_side`."""

    above_pixels: int = 40_000_000
    to_side: int = 2880

    def draft_size(self, width: int, height: int) -> tuple[int, int] | None:
        """The size at which a JPEG is decoded; None for a picture that is not reduced."""
        if width * height <= self.above_pixels:
            return None
        scale = max(1, min(width, height) // self.to_side)
        return width // scale, height // scale


REDUCTION = Reduction()

ColourProfile = Literal["convert", "ignore"]


def load_image(
    source: str | Path | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image | np.ndarray,
    reduction: Reduction = REDUCTION,
    colour_profile: ColourProfile = "convert",
) -> np.ndarray:
    """Read an image as (h, w, 3) uint8 RGB.

    source: a file, its content, an open binary file (read from its position on, not closed), a PIL image, or
    an array (h, w), (h, w, 1), (h, w, 3), (h, w, 4), uint8 or float in [0, 1].
    colour_profile: convert to sRGB, or ignore as the original does.
    Raises InputError if it cannot be used; ResourceError if a package is missing for its format.
    """
    if isinstance(source, np.ndarray):
        pixels = _from_array(source)
        check_size(pixels.shape[1], pixels.shape[0], "the image array")
        return pixels
    if isinstance(source, PIL.Image.Image):
        name = "the PIL image"
        return _to_pixels(decode_opened(source, name), name, reduction, colour_profile)
    name = f"image {source}" if isinstance(source, (str, os.PathLike)) else "the image in memory"
    with open_file(source, name) as file:
        stored = decode(file, name, reduction.draft_size)
    return _to_pixels(stored, name, reduction, colour_profile)


def _to_pixels(stored: Stored, name: str, reduction: Reduction, colour_profile: ColourProfile) -> np.ndarray:
    """(h, w, 3) uint8 of a decoded image of any mode."""
    image = stored.image
    if is_deep(image):
        image = _grey_from_deep(upright(image, name), stored, name)
    elif "transparency" in image.info:
        image = _with_alpha(stored)
    if image.width * image.height > reduction.above_pixels:
        image = _reduced(image, reduction)
    image = upright(image, name)
    if colour_profile == "convert":
        image = to_srgb(image, name)
    return np.asarray(_to_rgb(image), dtype=np.uint8)


def _with_alpha(stored: Stored) -> PIL.Image.Image:
    """The image with its transparent colour or palette entries as an alpha channel."""
    image, key = stored.image, stored.image.info["transparency"]
    if stored.low_bytes is not None:
        return _keyed_16_bit(image, stored.low_bytes, key)
    # PNG counts the key in the samples of the file, and only its lower bits; Pillow scales the samples alone.
    if image.mode == "L" and isinstance(key, int):
        bits = {"L;2": 2, "L;4": 4}.get(stored.raw_mode, 8)
        image.info["transparency"] = (key % 2**bits) * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value & 255 for value in key)
    try:
        return image.convert("RGBA")
    finally:
        image.info["transparency"] = key  # the caller may own the image


def _keyed_16_bit(image: PIL.Image.Image, low: PIL.Image.Image, key: tuple[int, int, int]) -> PIL.Image.Image:
    """`image`, the higher bytes, as RGBA; pixels that equal `key` in all 16 bits are transparent."""
    high_key = np.array([value >> 8 for value in key], np.uint8)
    low_key = np.array([value & 255 for value in key], np.uint8)
    clear = (np.asarray(image) == high_key).all(-1) & (np.asarray(low) == low_key).all(-1)
    del image.info["transparency"]
    image.putalpha(PIL.Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255))))
    return image


def _reduced(image: PIL.Image.Image, reduction: Reduction) -> PIL.Image.Image:
    factor = min(image.size) // reduction.to_side
    if factor < 2:
        return image
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "LAB":
        return lab_to_srgb(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = PIL.Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey_from_deep(image: PIL.Image.Image, stored: Stored, name: str) -> PIL.Image.Image:
    """12-, 16- and 32-bit grey as 8 bits; the range of 32 bits is 0..65535 for integers, 0..1 for floats."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 4095 if stored.raw_mode == "I;12" else 65535
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise InputError(f"{name} holds grey values outside 0..{top}; convert it to 8 bits first")
    if image.mode == "F":
        grey = np.rint(values * np.float32(255)).astype(np.uint8)
    else:
        grey = np.rint(np.arange(top + 1) / (top / 255)).astype(np.uint8)[values]
    if stored.white_is_zero:
        grey = 255 - grey
    info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    picture = PIL.Image.fromarray(grey)
    picture.info.update(info)
    key = image.info.get("transparency")
    if key is not None:
        picture.putalpha(PIL.Image.fromarray(np.where(values == key, np.uint8(0), np.uint8(255))))
    return picture


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or not array.size:
        raise InputError(
            f"the image array has shape {array.shape}; give (h, w), (h, w, 1), (h, w, 3) or (h, w, 4)"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise InputError("the image array holds floats outside [0, 1]; scale it or give uint8")
        array = np.rint(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"the image array is {array.dtype}; give uint8 or floats in [0, 1]")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 4:
        return np.asarray(_to_rgb(PIL.Image.fromarray(np.ascontiguousarray(array))))
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))
