"""Only regular files of known formats and bounded size reach a decoder; everything else is one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from media_files import tones, write_audio
from omniavatar.errors import InputError
from omniavatar.media.audio_source import open_audio
from omniavatar.media.image import load_image
from omniavatar.media.picture_file import MAX_FILE_BYTES, MAX_PIXELS
from omniavatar.media.signatures import content_of
from png_files import png_file

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
HEIC = Path(__file__).parents[2] / "data" / "portrait.heic"
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "PPM": {}, "JPEG2000": {}}
LOSSY = {"JPEG": {"quality": 100}, "AVIF": {"quality": 100}, "GIF": {}, "MPO": {"quality": 100}}


def saved(form: str, image: PIL.Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or PIL.Image.fromarray(PIXELS)).save(buffer, form, **options)
    return buffer.getvalue()


def error_of(source: object) -> str:
    with pytest.raises(InputError) as raised:
        load_image(source)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_under_any_name(tmp_path: Path, form: str) -> None:
    path = tmp_path / "picture.wav"
    path.write_bytes(saved(form, **LOSSLESS[form]))
    assert np.array_equal(load_image(path), PIXELS)


@pytest.mark.parametrize("form", LOSSY)
def test_lossy_formats(tmp_path: Path, form: str) -> None:
    flat = PIL.Image.new("RGB", (40, 24), (200, 100, 50))
    path = tmp_path / "picture"
    path.write_bytes(saved(form, flat, **LOSSY[form]))
    assert np.abs(load_image(path).astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_pictures_in_memory(kind: type) -> None:
    assert np.array_equal(load_image(kind(saved("PNG"))), PIXELS)


def test_open_files_stay_open_and_need_not_seek(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(saved("PNG"))
    with path.open("rb") as file:
        assert np.array_equal(load_image(file), PIXELS)
        assert not file.closed
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe, os.fdopen(write, "wb") as feed:
        feed.write(saved("PNG"))
        feed.close()
        assert np.array_equal(load_image(pipe), PIXELS)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "is empty"),
        (io.BytesIO(), "is empty"),
        (io.StringIO("text"), "mode 'rb'"),
        (b"no picture at all", "not an image in a known format"),
        (object(), "cannot be read"),
    ],
)
def test_bad_sources_in_memory(source: object, says: str) -> None:
    assert says in error_of(source)


def test_a_closed_file_is_one_line() -> None:
    file = io.BytesIO(saved("PNG"))
    file.close()
    assert "cannot be read" in error_of(file)


DEVICES = ["/dev/zero", "/dev/urandom", "/dev/null", "fifo", "folder", "link"]


@pytest.mark.parametrize("name", DEVICES)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.append(error_of(tmp_path / name)), daemon=True)
    thread.start()
    thread.join(10)
    what = {"fifo": "is a pipe", "folder": "is a folder"}.get(name, "is a device")
    assert done and what in done[0] and name in done[0]


def test_a_link_to_a_picture_is_followed(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(saved("PNG"))
    (tmp_path / "link").symlink_to("picture.png")
    assert np.array_equal(load_image(tmp_path / "link"), PIXELS)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.webp"
    path.write_bytes(saved("WEBP"))
    os.truncate(path, MAX_FILE_BYTES + 1)  # sparse
    assert "512 MB" in error_of(path)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n"
REFUSED = {
    "PostScript": POSTSCRIPT,
    "PostScript ": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + POSTSCRIPT,
    "PDF": b"%PDF-1.4\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "DDS": b"DDS " + (124).to_bytes(4, "little") + bytes(120),
    "SVG": b"\n <svg xmlns='http://www.w3.org/2000/svg'/>",
    "JPEG XL": b"\xff\x0a" + bytes(30),
    "Photoshop": b"8BPS\0\1" + bytes(30),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("suffix", ["png", "jpg", "eps"])
def test_other_formats_reach_no_decoder(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    path.write_bytes(REFUSED[name])
    message = error_of(path)
    assert f"is a {name.strip()} file, which is not read" in message and "PNG or JPEG" in message


@pytest.mark.parametrize("form", ["ICNS", "ICO", "PCX", "SGI", "TGA", "MSP", "XBM"])
def test_formats_outside_the_list_are_refused(form: str) -> None:
    image = PIL.Image.new("1" if form in ("MSP", "XBM") else "RGB", (32, 32))
    message = error_of(saved(form, image))
    assert "not an image in a known format" in message


SOUNDS = {"wav": "pcm_s16le", "flac": "flac", "mp3": "mp3", "ogg": "libopus", "m4a": "aac", "mka": "libopus"}


@pytest.mark.parametrize("suffix", SOUNDS)
def test_a_sound_as_picture_is_called_swapped(tmp_path: Path, suffix: str) -> None:
    path = write_audio(tmp_path / f"voice.{suffix}", tones(0.2, 48000, 1), 48000, SOUNDS[suffix], "mono")
    message = error_of(path)
    assert "swapped" in message and "not an image" in message


@pytest.mark.parametrize("form", [*LOSSLESS, *LOSSY, "HEIC"])
def test_a_picture_as_sound_is_called_swapped(tmp_path: Path, form: str) -> None:
    path = tmp_path / "voice.wav"
    path.write_bytes(HEIC.read_bytes() if form == "HEIC" else saved(form))
    with pytest.raises(InputError, match=r"voice\.wav is a picture .* swapped\?"), open_audio(path):
        pass


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\xff\xfb\x90\x64", "MP3 or AAC"),
        (b"\xff\xf1\x50\x80", "MP3 or AAC"),
        (b"ID3\4", "MP3"),
        (b"FORM\0\0\0\0AIFF", "AIFF"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42", "MP4"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "AVIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        ("text".encode("utf-16"), None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_contents_by_their_first_bytes(head: bytes, name: str | None) -> None:
    content = content_of(head)
    assert (content and content.name) == name


def png_header(width: int, height: int) -> bytes:
    """A PNG that says to have this size, with one row of pixels."""
    return png_file((width, height), 8, 0, bytes(1000))


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((16, 11_184_000), "more than 32 times"),
        ((11_184_000, 16), "more than 32 times"),
        ((33 * 16, 16), "more than 32 times"),
        ((14000, 14000), "178 megapixels"),
        ((2**31 - 1, 2**31 - 1), "178 megapixels"),
        ((15, 15), "only 15x15"),
    ],
)
def test_sizes_are_refused_by_the_header(size: tuple[int, int], says: str) -> None:
    assert says in error_of(png_header(*size))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_has_a_lower_limit(depth: int) -> None:
    content = png_file((9000, 9000), depth, 2, bytes(1000), tRNS=bytes(6))
    assert "81 megapixels with a transparent colour" in error_of(content)


def test_the_limit_holds_when_the_program_changed_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    assert MAX_PIXELS < 14000 * 14000
    assert "178 megapixels" in error_of(png_header(14000, 14000))


def test_narrow_arrays_are_refused() -> None:
    assert "more than 32 times" in error_of(np.zeros((16, 600, 3), np.uint8))


def test_a_huge_float_picture_is_refused_by_the_header() -> None:
    content = saved("TIFF", PIL.Image.new("F", (32, 32)))
    tags = PIL.Image.open(io.BytesIO(content)).tag_v2
    assert (tags[256], tags[257]) == (32, 32)
    size = (13000).to_bytes(4, "little")
    for tag in (256, 257):
        entry = content.index(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0")
        content = content[: entry + 8] + size + content[entry + 12 :]
    assert "169 megapixels of 16 or 32 bits" in error_of(content)


@pytest.mark.parametrize("form", [*LOSSLESS, *LOSSY, "HEIC"])
def test_damaged_pictures_give_an_image_or_one_line(form: str) -> None:
    whole = HEIC.read_bytes() if form == "HEIC" else saved(form)
    random = np.random.default_rng(len(form))
    refused = 0
    for _ in range(40):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(0, min(len(damaged), 400), random.integers(1, 9))
        damaged[places] = random.integers(0, 256, len(places))
        try:
            load_image(damaged.tobytes())
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused or form in ("BMP", "PPM")


@pytest.mark.slow
def test_a_missing_heic_reader_is_named_with_its_remedy() -> None:
    code = (
        "import sys\nsys.modules['pillow_heif'] = None\nfrom omniavatar.errors import ResourceError\n"
        "from omniavatar.media.image import load_image\n"
        "try: load_image(sys.argv[1])\nexcept ResourceError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(HEIC)], capture_output=True, text=True, check=True
    )
    assert "HEIC" in answer.stdout and "pip install pillow-heif" in answer.stdout
