"""Embedded colour profiles become sRGB; what is sRGB already keeps its bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import ExifTags, ImageCms

from colour_profiles import (
    ADOBE,
    P3,
    SRGB,
    cmyk_profile,
    grey_profile,
    in_srgb,
    rgb_profile,
    srgb_light,
)
from omniavatar.media.image import load_image
from png_files import chunk

SKIN = (200, 140, 110)
ADOBE_GAMMA = 563 / 256
WIDE = {"Display P3": (P3, 2.2), "Adobe RGB": (ADOBE, ADOBE_GAMMA)}
SRGB_PROFILES = {
    "Little CMS": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "1024 samples": rgb_profile(SRGB, srgb_light(np.linspace(0, 1, 1024))),
    "26 samples": rgb_profile(SRGB, srgb_light(np.linspace(0, 1, 26))),
}


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def saved(image: PIL.Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(
    ("mode", "form"), [("RGB", "PNG"), ("RGB", "TIFF"), ("RGB", "WEBP"), ("RGBA", "PNG"), ("P", "PNG")]
)
def test_wide_colours_become_srgb(name: str, mode: str, form: str) -> None:
    primaries, gamma = WIDE[name]
    image = PIL.Image.new("RGB", (32, 32), SKIN)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"lossless": True} if form == "WEBP" else {}
    content = saved(image, form, icc_profile=rgb_profile(primaries, gamma), **options)
    right = in_srgb(SKIN, primaries, gamma)
    assert np.abs(right - SKIN).max() > 8
    assert np.abs(load_image(content)[3, 3] - right).max() <= 1
    assert (load_image(content, colour_profile="ignore")[3, 3] == SKIN).all()


@pytest.mark.parametrize("form", ["JPEG", "AVIF"])
def test_wide_colours_of_lossy_formats(form: str) -> None:
    image = PIL.Image.new("RGB", (32, 32), SKIN)
    content = saved(image, form, quality=95, icc_profile=rgb_profile(P3, 2.2))
    assert np.abs(load_image(content)[3, 3] - in_srgb(SKIN, P3, 2.2)).max() <= 3


def test_a_phone_picture_is_upright_and_srgb() -> None:
    pixels = load_image(Path(__file__).parents[2] / "data" / "portrait.heic")
    assert pixels.shape == (64, 48, 3)
    for row, colour in ((10, (180, 60, 70)), (54, (60, 70, 180))):
        assert np.abs(pixels[row, 24] - in_srgb(colour, P3, 2.2)).max() <= 4


@pytest.mark.parametrize("profile", SRGB_PROFILES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_srgb_profiles_leave_every_byte(profile: str, mode: str) -> None:
    image = PIL.Image.fromarray(noise()).convert(mode)
    plain = load_image(saved(image, "PNG"))
    assert np.array_equal(load_image(saved(image, "PNG", icc_profile=SRGB_PROFILES[profile])), plain)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_profiles(mode: str) -> None:
    grey = np.full((32, 32), 100, np.uint8)
    if mode == "I;16":
        image = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = PIL.Image.fromarray(grey).convert(mode)
    content = saved(image, "PNG", icc_profile=grey_profile(1.8))
    right = 255 * (1.055 * ((100 / 255) ** 1.8) ** (1 / 2.4) - 0.055)
    assert np.abs(load_image(content) - right).max() <= 1
    assert (load_image(content, colour_profile="ignore") == 100).all()


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_cmyk_profiles(form: str) -> None:
    image = PIL.Image.new("CMYK", (32, 32), (0, 255, 0, 0))
    image.paste((0, 0, 0, 0), (16, 0, 32, 32))
    profile = cmyk_profile({(0, 0, 0, 0): 100, (0, 1, 0, 0): 50}, otherwise=0)
    pixels = load_image(saved(image, form, icc_profile=profile)).astype(int)
    assert np.abs(pixels[5, 5] - 119).max() <= 2  # L* 50
    assert np.abs(pixels[5, 26] - 255).max() <= 2


def test_transparency_stays_beside_a_profile() -> None:
    image = PIL.Image.new("RGBA", (32, 32), (*SKIN, 0))
    image.paste((*SKIN, 128), (0, 0, 16, 32))
    pixels = load_image(saved(image, "PNG", icc_profile=rgb_profile(P3, 2.2)))
    assert (pixels[5, 26] == 255).all()
    half = in_srgb(SKIN, P3, 2.2) * 128 / 255 + 127
    assert np.abs(pixels[5, 5] - half).max() <= 1.5


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"this is no profile"),
        ("RGB", rgb_profile(P3, 2.2)[:200]),
        ("RGB", grey_profile(1.8)),
        ("RGB", cmyk_profile({}, 50)),
        ("CMYK", rgb_profile(P3, 2.2).replace(b"RGB ", b"nope")),
    ],
)
def test_an_unusable_profile_is_a_warning(
    mode: str, profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    image = PIL.Image.new(mode, (32, 32), tuple(range(40, 40 + 10 * len(mode), 10)))
    plain = load_image(saved(image, "TIFF"))
    assert caplog.text == ""
    assert np.array_equal(load_image(saved(image, "TIFF", icc_profile=profile)), plain)
    assert len(caplog.records) == 1
    assert "colour profile" in caplog.text and "taken as sRGB" in caplog.text


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        (b"gAMA", [45455], ""),
        (b"gAMA", [100000], "gamma of 1"),
        (b"cHRM", [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000], ""),
        (b"cHRM", [31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000], "primaries"),
    ],
)
def test_other_colours_of_a_png_are_named(
    name: bytes, values: list[int], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = saved(PIL.Image.fromarray(noise()), "PNG")
    stated = chunk(name, b"".join(value.to_bytes(4, "big") for value in values))
    assert np.array_equal(load_image(content[:33] + stated + content[33:]), noise())
    assert (says in caplog.text) if says else (caplog.text == "")


@pytest.mark.parametrize(("index", "says"), [("R98", ""), ("R03", "Adobe RGB")])
def test_adobe_rgb_of_a_camera_is_named(index: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    exif = PIL.Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: index}
    load_image(saved(PIL.Image.fromarray(noise()), "JPEG", exif=exif))
    assert (says in caplog.text) if says else (caplog.text == "")
