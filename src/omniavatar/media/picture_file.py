"""Opens a picture for decoding: the only place that gives a file to Pillow.

Only regular files are read, up to `MAX_FILE_BYTES`. The content selects the format, not the name, and Pillow
gets that one format: no plugin that starts a program (EPS, PDF, WMF) is ever tried. Size and aspect are
checked from the header, before anything is decoded.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import PIL.Image
from PIL import ImageOps

from omniavatar.errors import InputError, OmniAvatarError, ResourceError
from omniavatar.media.input_files import open_input
from omniavatar.media.signatures import HEAD_BYTES, Content, content_of

MIN_SIDE = 16
MAX_ASPECT = 32
"""The longer side may have this many times the pixels of the shorter one."""
MAX_PIXELS = 178_956_970
MAX_DEEP_PIXELS = 64_000_000
"""Limit for pictures that need several copies while they become 8 bits without transparency."""
MAX_FILE_BYTES = 512_000_000

TIFF_PHOTOMETRIC = 262
FORMATS = "PNG, JPEG, WebP, HEIC, AVIF, TIFF, BMP, GIF, JPEG 2000 or PPM"

_log = logging.getLogger(__name__)


def open_file(source: str | Path | bytes | bytearray | memoryview | BinaryIO, name: str) -> BinaryIO:
    """The bytes of a picture, as a seekable file. Raises InputError that starts with `name`."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        file: BinaryIO = io.BytesIO(source)
        size = len(file.getbuffer()) if isinstance(file, io.BytesIO) else 0
    elif isinstance(source, (str, os.PathLike)):
        file = open_input(Path(source), name)
        size = os.fstat(file.fileno()).st_size
    else:
        file = _in_memory(source, name)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    problem = ""
    if not size:
        problem = "is empty; give another file"
    elif size > MAX_FILE_BYTES:
        problem = f"has more than {MAX_FILE_BYTES // 1_000_000} MB; save it as PNG or JPEG of 8 bits"
    if problem:
        file.close()
        raise InputError(f"{name} {problem}")
    return file


def _in_memory(source: BinaryIO, name: str) -> BinaryIO:
    """The rest of an open file, which need not be seekable and stays open."""
    try:
        data = source.read(MAX_FILE_BYTES + 1)
    except Exception as error:  # whatever a foreign file object raises
        raise InputError(f"{name} cannot be read ({_reason(error)}); give an open binary file") from error
    if not isinstance(data, bytes):
        raise InputError(f"{name} gives {type(data).__name__}, not bytes; open it with mode 'rb'")
    return io.BytesIO(data)


@dataclass(frozen=True, eq=False)
class Stored:
    """A decoded picture, and what Pillow forgets about its samples when it decodes them.

    raw_mode: how the file holds them, such as "L;4"; empty for a picture that was decoded elsewhere.
    white_is_zero: of deep grey from a TIFF, which Pillow inverts for 8 bits only.
    low_bytes: of 16-bit RGB with a transparent colour, the lower 8 bits of every sample; else None.
    """

    image: PIL.Image.Image
    raw_mode: str = ""
    white_is_zero: bool = False
    low_bytes: PIL.Image.Image | None = None


def decode(file: BinaryIO, name: str, draft_size: Callable[[int, int], tuple[int, int] | None]) -> Stored:
    """Decode the first picture of `file`. Raises InputError, ResourceError.

    draft_size: of (width, height), the size at which a JPEG may be decoded to save memory, or None.
    """
    content = _checked_content(file, name)
    with _decoding(name), PIL.Image.open(file, formats=[content.reader]) as image:
        raw_mode = _raw_mode(image)
        keyed = image.mode == "RGB" and "transparency" in image.info
        _check_header(image, name, keyed)
        if getattr(image, "is_animated", False):
            _log.info("%s holds several pictures: its first frame is used", name)
        size = draft_size(*image.size)
        if size is not None:
            image.draft(None, size)
        image.load()
        _check_header(image, name)  # a HEIC can decode to another size than its header names
        low_bytes = _low_bytes(file) if keyed and raw_mode == "RGB;16B" else None
        return Stored(image, raw_mode, _white_is_zero(image), low_bytes)


def decode_opened(image: PIL.Image.Image, name: str) -> Stored:
    """Decode a PIL image of the caller, unless that was done before. Raises InputError."""
    with _decoding(name):
        raw_mode = _raw_mode(image)
        _check_header(image, name)
        image.load()
    return Stored(image, raw_mode, _white_is_zero(image))


def upright(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """The picture turned as its EXIF data says. Raises InputError for damaged EXIF data."""
    with _decoding(name):
        return ImageOps.exif_transpose(image)


def _checked_content(file: BinaryIO, name: str) -> Content:
    content = content_of(file.read(HEAD_BYTES))
    file.seek(0)
    if content is None:
        raise InputError(f"{name} is not an image in a known format ({FORMATS}); convert it to PNG or JPEG")
    if content.kind in ("sound", "video"):
        raise InputError(
            f"{name} is a {content.kind} ({content.name}), not an image; "
            "give a picture (are image and audio swapped?)"
        )
    if not content.reader:
        raise InputError(f"{name} is a {content.name} file, which is not read; save it as PNG or JPEG")
    if content.reader == "HEIF":
        _add_heif_reader(name)
    return content


def _white_is_zero(image: PIL.Image.Image) -> bool:
    tags = getattr(image, "tag_v2", {})
    return is_deep(image) and tags.get(TIFF_PHOTOMETRIC) == 0


def _low_bytes(file: BinaryIO) -> PIL.Image.Image:
    """The lower bytes of big-endian 16-bit RGB: a little-endian reader takes them for the higher ones."""
    file.seek(0)
    with PIL.Image.open(file, formats=["PNG"]) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
        return image


def _check_header(image: PIL.Image.Image, name: str, keyed: bool = False) -> None:
    check_size(*image.size, name)
    if (keyed or is_deep(image)) and image.width * image.height > MAX_DEEP_PIXELS:
        what = "with a transparent colour" if keyed else "of 16 or 32 bits"
        raise InputError(
            f"{name} has {_megapixels(*image.size)} {what}, "
            f"more than {MAX_DEEP_PIXELS // 1_000_000}; convert it to plain 8 bits or make it smaller"
        )


def is_deep(image: PIL.Image.Image) -> bool:
    """Whether a picture has grey values of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def check_size(width: int, height: int, name: str) -> None:
    """Raise InputError for a picture that is too small, too narrow or too large."""
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{name} is only {width}x{height} pixels; give a portrait of at least {MIN_SIDE} pixels a side"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise InputError(
            f"{name} has {width}x{height} pixels: one side is more than {MAX_ASPECT} times the other; "
            "crop it first"
        )
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {_megapixels(width, height)}, more than {MAX_PIXELS // 1_000_000} megapixels; "
            "make it smaller first"
        )


def _megapixels(width: int, height: int) -> str:
    return f"{width}x{height} = {width * height / 1e6:.0f} megapixels"


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Make one InputError of any exception of Pillow for a damaged picture, and log lines of its warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            yield
        except OmniAvatarError:
            raise
        except PIL.Image.DecompressionBombError as error:
            limit = MAX_PIXELS // 1_000_000
            raise InputError(f"{name} has more than {limit} megapixels; make it smaller first") from error
        except PIL.UnidentifiedImageError as error:
            raise InputError(
                f"{name} is damaged or truncated (its header cannot be read); export or download it again"
            ) from error
        except MemoryError as error:
            raise InputError(f"{name} needs more memory than is free; make it smaller first") from error
        except Exception as error:  # the plugins raise many classes for a damaged file, SyntaxError included
            raise InputError(
                f"{name} is damaged or truncated ({_reason(error)}); export or download it again"
            ) from error
    for text in dict.fromkeys(_first_line(str(warning.message)) for warning in seen):
        _log.warning("%s: %s", name, text)


def _reason(error: Exception) -> str:
    return _first_line(str(error)) or type(error).__name__


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""


def _add_heif_reader(name: str) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise ResourceError(
            f"{name} is a HEIC picture, which needs the package pillow-heif; "
            "run `pip install pillow-heif`, or export the picture as JPEG"
        ) from error
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)


def _raw_mode(image: PIL.Image.Image) -> str:
    """How the file holds the samples; empty after decoding."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return ""
    args = tiles[0][3]
    return cast(str, args if isinstance(args, str) else args[0] if args else "")
