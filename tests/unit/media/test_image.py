"""Pictures of every kind become RGB bytes, or one clear line."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from omniavatar.errors import InputError
from omniavatar.media.image import Reduction, load_image
from omniavatar.media.picture_file import MIN_SIDE

RED, BLUE = (250, 10, 10), (10, 10, 250)


def two_halves(size: tuple[int, int] = (48, 32)) -> PIL.Image.Image:
    """Width x height: left half red, right half blue."""
    image = PIL.Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, size[0], size[1]))
    return image


def near(pixel: np.ndarray, colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    return bool(np.abs(pixel.astype(int) - colour).max() <= tolerance)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGB", "jpg"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
        ("RGB", "tiff"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("CMYK", "tiff"),
        ("YCbCr", "jpg"),
    ],
)
def test_colour_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    palette = {"palette": PIL.Image.Palette.ADAPTIVE} if mode == "P" else {}
    two_halves().convert(mode, **palette).save(path, **({"lossless": True} if suffix == "webp" else {}))
    pixels = load_image(path)
    assert pixels.shape == (32, 48, 3) and pixels.dtype == np.uint8
    # CMYK has no colour profile here: red and blue, roughly.
    tolerance = 12 if mode != "CMYK" else 40
    assert near(pixels[16, 5], RED, tolerance) and near(pixels[16, 42], BLUE, tolerance)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_grey_modes(tmp_path: Path, mode: str) -> None:
    grey = np.zeros((32, 48), np.uint8)
    grey[:, 24:] = 255
    if mode == "I;16":
        image = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = PIL.Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "grey.png")
    pixels = load_image(tmp_path / "grey.png")
    assert np.array_equal(pixels, np.repeat(grey[:, :, None], 3, axis=2))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    pixels = load_image(PIL.Image.fromarray(values))
    assert np.array_equal(pixels[..., 0], np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("png", {}), ("tiff", {}), ("tiff", {"compression": "tiff_lzw"}), ("webp", {"lossless": True})],
)
def test_exif_rotation(tmp_path: Path, orientation: int, suffix: str, options: dict[str, object]) -> None:
    upright = two_halves()
    turned = {
        1: None,
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if turned is None else upright.transpose(turned)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif, **options)
    assert np.array_equal(load_image(path), np.asarray(upright))


def test_transparency_is_laid_on_white() -> None:
    image = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 0, 0, 128), (0, 0, 16, 32))
    pixels = load_image(image)
    assert (pixels[0, 31] == 255).all()
    assert near(pixels[0, 0], (228, 127, 127), 1)


def test_palette_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = two_halves().convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=4)
    image.info["transparency"] = image.getpixel((5, 5))
    image.save(tmp_path / "clear.gif", transparency=image.getpixel((5, 5)))
    pixels = load_image(tmp_path / "clear.gif")
    assert (pixels[5, 5] == 255).all() and near(pixels[5, 42], BLUE)


def test_animation_gives_its_first_frame_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = PIL.Image.new("RGB", (32, 32), RED), PIL.Image.new("RGB", (32, 32), BLUE)
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    with caplog.at_level(logging.INFO, logger="omniavatar"):
        pixels = load_image(tmp_path / "moving.gif")
    assert near(pixels[0, 0], RED)
    assert "first frame" in caplog.text


def test_arrays() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(load_image(colour), colour)
    assert np.array_equal(load_image(colour.astype(np.float32) / 255), colour)
    assert np.array_equal(load_image(colour[..., 0]), np.repeat(colour[..., :1], 3, axis=2))
    assert np.array_equal(load_image(colour[..., :1]), np.repeat(colour[..., :1], 3, axis=2))
    opaque = np.concatenate([colour, np.full((20, 30, 1), 255, np.uint8)], axis=2)
    assert np.array_equal(load_image(opaque), colour)
    assert (load_image(np.zeros((20, 30, 4), np.uint8)) == 255).all()


def test_floats_are_rounded_not_truncated() -> None:
    assert (load_image(np.full((16, 16, 3), 99.6 / 255)) == 100).all()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((32, 32, 2), np.uint8), "shape"),
        (np.zeros((32,), np.uint8), "shape"),
        (np.zeros((0, 32, 3), np.uint8), "shape"),
        (np.zeros((1, 32, 32, 3), np.uint8), "shape"),
        (np.zeros((32, 32, 3), np.int64), "int64"),
        (np.full((32, 32, 3), 2.0), "[0, 1]"),
        (np.full((32, 32, 3), np.nan), "[0, 1]"),
        (np.zeros((MIN_SIDE - 1, 32, 3), np.uint8), "only 32x15"),
    ],
)
def test_bad_arrays(array: np.ndarray, says: str) -> None:
    with pytest.raises(InputError) as raised:
        load_image(array)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def _bytes(image: PIL.Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def _noise() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


BAD_FILES = {
    "empty.png": (b"", "empty"),
    "text.jpg": (b"this is not an image at all", "not an image"),
    "cut.png": (_bytes(_noise(), "PNG")[:5000], "truncated"),
    "cut.jpg": (_bytes(_noise(), "JPEG")[:2000], "truncated"),
    "header.png": (_bytes(_noise(), "PNG")[:20], "image"),
    "onepixel.png": (_bytes(PIL.Image.new("RGB", (1, 1)), "PNG"), "only 1x1"),
    "thin.png": (_bytes(PIL.Image.new("RGB", (500, 15)), "PNG"), "only 500x15"),
    "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "PNG or JPEG"),
    "sound.png": (b"RIFF\x24\0\0\0WAVEfmt ", "sound (WAV), not an image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, says = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as raised:
        load_image(tmp_path / name)
    message = str(raised.value)
    assert name in message and says in message and "\n" not in message


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="folder"):
        load_image(tmp_path)
    for odd in ("x" * 5000, "a\0b.png", str(tmp_path / "nothing.png" / "below.png")):
        with pytest.raises(InputError) as raised:
            load_image(odd)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_every_cut_gives_an_image_or_one_line(tmp_path: Path, form: str) -> None:
    whole = _bytes(_noise(), form)
    path = tmp_path / "cut"
    for size in range(1, len(whole), max(1, len(whole) // 25)):
        path.write_bytes(whole[:size])
        try:
            load_image(path)
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["jpg", "png"])
def test_hundred_megapixels(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"huge.{form}"
    image = PIL.Image.new(
        "L" if form == "png" else "RGB", (12000, 8400), 200 if form == "png" else (200, 200, 200)
    )
    image.save(path, **({"compress_level": 1} if form == "png" else {}))
    del image
    code = (
        "import resource, sys\nfrom omniavatar.media.image import load_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pixels = load_image(sys.argv[1])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(*pixels.shape, pixels.min(), pixels.max(), (after - before) // 1024)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    height, width, channels, low, high, grown_mib = map(int, answer.stdout.split())
    assert channels == 3 and min(height, width) >= 2880 and low == high == 200
    assert abs(width / height - 12000 / 8400) < 0.01
    assert grown_mib < 250, f"grew by {grown_mib} MiB"


def test_decompression_bomb_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    PIL.Image.new("1", (20000, 10000)).save(path)
    with pytest.raises(InputError, match="178 megapixels"):
        load_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "I;16", "I", "F", "CMYK", "HSV", "RGBX"])
def test_images_above_the_reduction_limit_in_every_mode(mode: str) -> None:
    small = Reduction(above_pixels=1000, to_side=20)
    assert load_image(PIL.Image.new(mode, (100, 60)), small).shape == (20, 34, 3)
