"""A picture from a file or from memory, as RGB bytes.

The EXIF rotation is applied, and transparency becomes white. The first frame of an animation is used, which
is logged (a PIL image: its current frame). CMYK, grey, palette and 16-bit pictures become 8-bit RGB. Embedded
colour profiles are not applied, as in the original.

Limits: at least 16 pixels a side, at most 178,956,970 pixels (Pillow's limit against decompression bombs). A
picture above 40 megapixels is reduced by a whole factor during or right after decoding, to at least 2880
pixels on its shorter side, so that 100 megapixels need little memory.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageOps

from omniavatar.errors import InputError
from omniavatar.media.input_files import existing_file

MIN_SIDE = 16
REDUCE_ABOVE_PIXELS = 40_000_000
REDUCE_TO_SIDE = 2880

_log = logging.getLogger(__name__)

# What Pillow's format plugins raise for damaged files, in addition to UnidentifiedImageError (an OSError).
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def load_image(source: str | Path | PIL.Image.Image | np.ndarray) -> np.ndarray:
    """Read an image as (h, w, 3) uint8 RGB.

    source: a file, a PIL image, or an array (h, w), (h, w, 1), (h, w, 3), (h, w, 4), uint8 or float in [0,
    1].
    Raises InputError if it cannot be used.
    """
    if isinstance(source, np.ndarray):
        pixels = _from_array(source)
        name = "the image array"
    elif isinstance(source, PIL.Image.Image):
        name = "the PIL image"
        with _damage_as_one_line(name):
            pixels = _decode(source, name)
    else:
        name = f"image {source}"
        pixels = _from_file(existing_file(source, name), name)
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{name} is only {width}x{height} pixels; give a portrait of at least {MIN_SIDE} pixels a side"
        )
    return pixels


def _from_file(path: Path, name: str) -> np.ndarray:
    with warnings.catch_warnings(), _damage_as_one_line(name):
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                _log.info("%s is animated: its first frame is used", name)
                image.seek(0)
            if image.width * image.height > REDUCE_ABOVE_PIXELS:
                scale = max(1, min(image.size) // REDUCE_TO_SIDE)
                image.draft(None, (image.width // scale, image.height // scale))
            return _decode(image, name)


@contextmanager
def _damage_as_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{name} has more than 178 megapixels; make it smaller first") from error
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image Pillow can read; convert it to PNG or JPEG") from error
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name} is damaged or truncated ({reason}); export or download it again") from error


def _decode(image: PIL.Image.Image, name: str) -> np.ndarray:
    """(h, w, 3) uint8 of an opened image of any mode."""
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey_from_deep(ImageOps.exif_transpose(image), name)
    if image.width * image.height > REDUCE_ABOVE_PIXELS:
        image = _reduced(image)
    return np.asarray(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)


def _reduced(image: PIL.Image.Image) -> PIL.Image.Image:
    factor = min(image.size) // REDUCE_TO_SIDE
    if factor < 2:
        return image
    if image.mode in ("1", "P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = PIL.Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey_from_deep(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """16- and 32-bit grey as 8 bits; the range is 0..65535 for integers, 0..1 for floats."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise InputError(f"{name} holds grey values outside 0..{top}; convert it to 8 bits first")
    if image.mode == "F":
        grey = np.rint(values * np.float32(255)).astype(np.uint8)
    else:
        grey = np.rint(np.arange(65536) / 257).astype(np.uint8)[values]
    return PIL.Image.fromarray(grey)


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
