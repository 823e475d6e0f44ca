"""Converts a picture from its embedded colour profile (ICC) to sRGB.

The conversion is Little CMS's, with the perceptual intent, as browsers show pictures. A profile that is sRGB
within two levels of 255 leaves the pixels as they are. A damaged profile causes a warning, and the colours
are taken as sRGB.
"""

from __future__ import annotations

import io
import logging

import numpy as np
import PIL.Image
from PIL import ExifTags, ImageCms

SAME_LEVELS = 2
"""A profile whose colours differ from sRGB by no more than this is sRGB."""

SRGB_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""x and y of white, red, green and blue."""
SRGB_GAMMA = 1 / 2.2
ADOBE_RGB = "R03"
"""The interoperability index of cameras' Adobe RGB."""

_log = logging.getLogger(__name__)

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Modes of Pillow that the colour spaces of profiles mean."""


def to_srgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    """`image`, decoded and of 8 bits, with its profile applied; the same object if it has none or sRGB."""
    data = image.info.get("icc_profile")
    if not data:
        if found := _other_colours(image):
            _log.warning(
                "%s: its colours are taken as sRGB, but it states %s; convert it to sRGB if they look wrong",
                name,
                found,
            )
        return image
    try:
        transform, mode = _transform(data)
    except Exception as error:  # Little CMS and its binding raise several classes for a damaged profile
        return _as_srgb(image, name, f"is damaged ({str(error) or type(error).__name__})")
    if transform is None:
        return image
    transparent = image.has_transparency_data
    layer = image.convert("RGBA") if transparent else image
    if mode in ("CMYK", "LAB") and image.mode != mode:
        return _as_srgb(image, name, f"is for {mode}, the picture is {image.mode}")
    if mode == "L" and image.mode not in ("1", "L", "LA") and not image.mode.startswith("I;16"):
        return _as_srgb(image, name, f"is for grey, the picture is {image.mode}")
    colours = (layer if mode != "L" else image).convert(mode)
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None
    if transparent:
        converted.putalpha(layer.getchannel("A"))
    return converted


def lab_to_srgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of mode LAB without a profile, as RGB."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, _srgb(), "LAB", "RGB"))
    assert converted is not None
    return converted


def _as_srgb(image: PIL.Image.Image, name: str, problem: str) -> PIL.Image.Image:
    problem = " ".join(problem.split())
    _log.warning("%s: its colour profile %s; the colours are taken as sRGB", name, problem)
    return image


def _other_colours(image: PIL.Image.Image) -> str:
    """The colours that a picture without a profile states in another way, unless they are those of sRGB."""
    info = image.info
    primaries, gamma = info.get("chromaticity"), info.get("gamma")
    if "srgb" not in info:
        if primaries is not None and np.abs(np.subtract(primaries, SRGB_CHROMATICITIES)).max() > 0.005:
            return "other primaries (cHRM)"
        if gamma is not None and abs(gamma - SRGB_GAMMA) > 0.01:
            return f"a gamma of {gamma:g} (gAMA)"
    coded = info.get("nclx_profile")
    if coded and (coded["color_primaries"] not in (1, 2) or coded["transfer_characteristics"] in (16, 18)):
        return "a wide or high dynamic range (nclx)"
    try:
        interoperability = image.getexif().get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # no EXIF part that could name one
        return ""
    except Exception:  # Pillow raises several classes for damaged EXIF data
        return "colours that cannot be read (its EXIF data is damaged)"
    return "Adobe RGB (EXIF)" if ADOBE_RGB in interoperability.values() else ""


def _transform(data: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform of a profile to sRGB, or None for sRGB itself; and the mode that it reads."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
    mode = _MODES[profile.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(profile, _srgb(), mode, "RGB")
    probe = _probe(mode)
    if probe is not None:
        changed = ImageCms.applyTransform(probe, transform)
        assert changed is not None
        difference = np.asarray(changed, dtype=np.int16) - np.asarray(probe.convert("RGB"), dtype=np.int16)
        if np.abs(difference).max() <= SAME_LEVELS:
            return None, mode
    return transform, mode


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _probe(mode: str) -> PIL.Image.Image | None:
    """Colours over the whole range of RGB or grey; None for the other modes, which are never sRGB."""
    if mode == "L":
        return PIL.Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    if mode != "RGB":
        return None
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
    return PIL.Image.fromarray(cube.reshape(len(levels), -1, 3))
