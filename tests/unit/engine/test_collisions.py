"""All targets of an input file are checked before the first video, and each refusal belongs to its line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniavatar.config.load import load_config
from omniavatar.engine.collisions import check_lines, folds_case
from omniavatar.engine.requests_file import BadLine, RequestLine


@pytest.fixture
def lines(tmp_path: Path):
    """Makes lines with these output names (None: the default name) and checks them."""
    image = tmp_path / "face.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image)
    config = load_config("pocket", {"output_dir": str(tmp_path)}).config

    def check(*outputs: str | None, **inputs: Path) -> dict[int, str]:
        made = [
            RequestLine(i, i + 1, "four", inputs.get("image", image), inputs.get("audio"), output)
            for i, output in enumerate(outputs)
        ]
        checked = check_lines(made, config)
        return {line.line: str(line.error) for line in checked if isinstance(line, BadLine)}

    return check


def test_names_that_do_not_touch_are_good(lines) -> None:
    assert lines("x.mp4", "y.mp4", "x.partial.partial.mp4", "X.y.mp4", None, None) == {}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("x.partial.mp4", "x.mp4", "its preview x.partial.mp4 is already used by line 1, as its output"),
        ("x.mp4", "x.partial.mp4", "its output x.partial.mp4 is already used by line 1, as its preview"),
        ("x.mp4", "x.MP4", "its sidecar x.json is already used by line 1"),
        ("001_four.mp4", None, "its output 001_four.mp4 is already used by line 1"),
        ("x.mp4", "x.mp4", "its output x.mp4 is already used by line 1"),
        ("real.mp4", "link.mp4", "its output real.mp4 is already used by line 1"),
    ],
)
def test_outputs_that_collide(lines, tmp_path, first, second, message) -> None:
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    bad = lines(first, second, "good.mp4")
    assert list(bad) == [2] and bad[2].startswith(f"line 2: {message}")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (".mp4", "give the output that ending"),
        ("x\0.mp4", "NUL"),
        ("adir.mp4", "is a folder"),
        ("y" * 253 + ".mp4", "the file name is too long"),
        ("his.mp4", "his.json: was not written by omniavatar"),
    ],
)
def test_an_impossible_output_belongs_to_its_line(lines, tmp_path, output, message) -> None:
    (tmp_path / "adir.mp4").mkdir()
    (tmp_path / "his.json").write_text("{}")
    bad = lines(output, "good.mp4")
    assert list(bad) == [1] and message in bad[1]


@pytest.mark.parametrize("made", ["voice.mp4", "link.mp4", "other.mp4"])
def test_the_input_of_any_line_is_no_output(lines, tmp_path, made) -> None:
    voice = tmp_path / "voice.mp4"
    voice.write_bytes(b"sound")
    (tmp_path / "link.mp4").symlink_to(voice)
    os.link(voice, tmp_path / "other.mp4")
    bad = lines("good.mp4", made, audio=voice)
    assert list(bad) == [2] and "would replace the audio of line 1" in bad[2]
    assert voice.read_bytes() == b"sound"


def test_case_is_told_apart_where_the_file_system_does(lines, tmp_path) -> None:
    (tmp_path / "a").touch()
    folds = (tmp_path / "A").exists()
    assert folds_case(tmp_path) is folds
    assert list(lines("talk.mp4", "TALK.mp4")) == ([2] if folds else [])
