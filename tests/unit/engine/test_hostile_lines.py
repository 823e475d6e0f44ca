"""Input files with a bad line: the error is that of its line, and the next line is read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from omniavatar.engine.csv_rows import csv_rows
from omniavatar.engine.requests_file import BadLine, RequestLine, read_requests
from omniavatar.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "face.png").touch()
    (tmp_path / "voice.wav").touch()
    return tmp_path


def read(folder: Path, ending: str, content: bytes) -> list[RequestLine | BadLine]:
    path = folder / f"in{ending}"
    path.write_bytes(content)
    return read_requests(path)


def first_is_bad(folder: Path, ending: str, content: bytes) -> str:
    """The error of the first request, without the file's name; the second one is good."""
    bad, good = read(folder, ending, content)
    assert isinstance(good, RequestLine) and good.prompt == "good" and isinstance(bad, BadLine)
    assert "\n" not in str(bad.error) and len(str(bad.error)) < 600
    return str(bad.error).removeprefix(f"{folder / 'in'}{ending}")


GOOD = b'\n{"prompt": "good", "image": "face.png"}\n'


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"image": "~nosuchuser.png"}, "image not found: ~nosuchuser.png or "),
        ({"image": "~nosuchuser/face.png"}, "the home folder of ~nosuchuser is not known"),
        ({"audio": "~nosuchuser.wav"}, "audio not found"),
        ({"image": "a\0b"}, "image holds a NUL character; remove it"),
        ({"output": "x\0.mp4"}, "output holds a NUL character; remove it"),
        ({"prompt": "\0"}, "prompt holds a NUL character; remove it"),
        ({"output": ".mp4"}, "output .mp4: has no name before .mp4"),
        ({"output": f"{'x' * 300}.mp4"}, "is longer than 255 bytes; choose a shorter name"),
        ({"output": f"{'é' * 126}.mp4"}, "is longer than 255 bytes"),
        ({"output": "\ud83d.mp4"}, "output holds half of a character (\\ud83d at character 1)"),
        (
            {"prompt": "\ud800 hi"},
            "prompt holds half of a character (\\ud800 at character 1); write it as UTF-8",
        ),
        ({"prompt": "x" * 10_000_000}, "prompt has 10,000,000 bytes, the most is 65,536; the model uses the"),
        ({"negative_prompt": "\ud800"}, "negative_prompt: holds half of a character"),
        ({"image": "x" * 5000}, "image not found: "),
        ({"image": "."}, "image . is a folder; give a file"),
        ({"image": "/dev/zero"}, "image /dev/zero is a device or a FIFO; give a file"),
        ({"seed": 1e17}, "seed: must be a whole number in digits"),
        ({"seed": True}, "seed: must be a whole number"),
        ({"k" * 5000: 1}, "unknown key 'kkkk"),
        ({"image": [[[1]] * 5000]}, "image must be text; got [[[1], [1], "),
    ],
)
def test_a_hostile_value_fails_only_its_line(folder: Path, fields: dict[str, object], problem: str) -> None:
    line = json.dumps({"prompt": "p", "image": "face.png", **fields})
    error = first_is_bad(folder, ".jsonl", line.encode() + GOOD)
    assert error.startswith(":1: ") and problem in error


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "caf\xe9", "image": "face.png"}', "holds a byte that is not UTF-8 (0xe9 at character"),
        (b'{"prompt": ' + b"[" * 5000, "nested more than 100 levels deep"),
        (b'{"prompt": "p", "image": "face.png", "seed": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"prompt": "p", "image": "face.png", "seed": NaN}', "NaN is not a number"),
        (b'{"prompt": "p", "image": "face.png", "shift": 1e999}', "is too large"),
        (b'{"prompt": "p", "image": "face.png", "prompt": "q"}', "key 'prompt' occurs twice"),
        (b'{"prompt": "a\0b", "image": "face.png"}', "Invalid control character"),
        (b"\xff\xff", "not valid JSON"),
    ],
)
def test_a_line_that_is_no_json_fails_alone(folder: Path, line: bytes, problem: str) -> None:
    assert problem in first_is_bad(folder, ".jsonl", line + GOOD)


def test_a_text_line_that_is_not_utf8_fails_alone(folder: Path) -> None:
    error = first_is_bad(folder, ".txt", b"caf\xe9@@face.png\ngood@@face.png")
    assert ":1: prompt holds a byte that is not UTF-8 (0xe9 at character 4)" in error


def test_empty_columns_of_spreadsheets_are_ignored(folder: Path) -> None:
    lines = read(
        folder,
        ".csv",
        b"prompt,image,,audio,,,\r\none,face.png,,voice.wav,,,\r\ntwo,face.png\r\n,,,,,,,,,\r\n",
    )
    assert [(line.line, line.prompt) for line in lines if isinstance(line, RequestLine)] == [
        (2, "one"),
        (3, "two"),
    ]
    assert isinstance(lines[0], RequestLine) and lines[0].audio == folder / "voice.wav" and len(lines) == 2
    error = first_is_bad(folder, ".csv", b"prompt,image,,\np,face.png,,lost\ngood,face.png,,\n")
    assert error == ":2: cell 4 is in a column without a name; name it in the header"
    error = first_is_bad(folder, ".csv", b"prompt,image\na, b,face.png,,\ngood,face.png,,\n")
    assert error == ":2: 3 cells for 2 columns; quote cells that hold commas"


@pytest.mark.parametrize(
    "header", [b"prompt;image", b"prompt,image,prompt", b"prompt,", b"caf\xe9,image", b""]
)
def test_a_header_must_name_its_columns(folder: Path, header: bytes) -> None:
    with pytest.raises(InputError, match="the header must name prompt and image"):
        read(folder, ".csv", header + b"\np,face.png\n")


def test_a_quote_without_an_end_fails_alone(folder: Path) -> None:
    error = first_is_bad(folder, ".csv", b'prompt,image\n"no end,face.png\ngood,face.png\n')
    assert error == ":2: a quote has no end; close it, or double the quotes inside of a cell"
    good, bad = read(folder, ".csv", b'prompt,image\n5" disk,face.png\n"p\n\n')
    assert isinstance(good, RequestLine) and good.prompt == '5" disk' and isinstance(bad, BadLine)


def test_rows_are_those_of_the_csv_module() -> None:
    text = 'a,"b\nc",""\r\n\n"x ""y""",z\n'
    assert csv_rows(text) == [(2, ["a", "b\nc", ""]), (3, []), (4, ['x "y"', "z"])]
    opened = csv_rows('"\n""x"\n' * 1000)
    assert opened[0][0] >= 1 and len(opened) <= 2003


def test_a_cell_may_be_long_and_a_longer_one_fails_alone(folder: Path) -> None:
    import csv

    before = csv.field_size_limit()
    error = first_is_bad(folder, ".csv", b"prompt,image\n" + b"x" * 200_000 + b",face.png\ngood,face.png\n")
    assert error.startswith(":2: prompt has 200,000 bytes") and csv.field_size_limit() == before
    (line,) = read(folder, ".csv", b"prompt,image\n" + b"x" * 60_000 + b",face.png\n")
    assert isinstance(line, RequestLine) and len(line.prompt) == 60_000


@pytest.mark.parametrize("special", ["/dev/zero", "fifo", "utf16", "large"])
def test_an_input_file_is_a_regular_text_file(folder: Path, special: str) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "utf16").write_bytes("p@@face.png".encode("utf-16"))
    (folder / "large").touch()
    os.truncate(folder / "large", 65_000_000)
    with pytest.raises(
        InputError, match=r"is a device|is a FIFO|not UTF-8 text but UTF-16|more than 64,000,000"
    ):
        read_requests(folder / special)


def test_many_lines_are_read_in_one_go(folder: Path) -> None:
    begun = time.process_time()
    lines = read(folder, ".txt", b"p@@face.png\n" * 10_000)
    assert len(lines) == 10_000 and isinstance(lines[-1], RequestLine) and lines[-1].line == 10_000
    assert time.process_time() - begun < 5
