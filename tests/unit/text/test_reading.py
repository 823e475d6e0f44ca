"""Files of text from outside: one line for each kind of file that is not what it should be."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.errors import ConfigError, InputError
from omniavatar.text import JsonError, parse_json, read_json, read_record, read_text


def refusal(path: Path | str, most: int = 1000) -> str:
    with pytest.raises(InputError) as caught:
        read_text(path, most, InputError)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
    return str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is a FIFO" in refusal(tmp_path / "fifo")
    assert "is a device" in refusal("/dev/zero") and "is a device" in refusal("/dev/urandom")
    assert "is a folder" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "none")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert "the name is not a path" in refusal(f"{tmp_path}/a\0b")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "symbolic links" in refusal(tmp_path / "circle")


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 1000)
    assert read_text(path, 1000, InputError) == "x" * 1000
    assert "more than 999 bytes" in refusal(path, 999)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a\nb\xe9\n", ":2: not UTF-8 text (byte 0xe9)"),
        ("aé".encode("utf-16"), ": not UTF-8 text but UTF-16"),
        (b"a\n\nb\0", ":3: holds the control character \\x00"),
        (b"a\x1b[31m", ":1: holds the control character \\x1b"),
    ],
)
def test_text_is_utf8_without_control_characters(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert problem in refusal(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\t\r\n".encode())
    assert read_text(path, 100, InputError) == "é\t\r\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 101 + "]" * 101, "nested more than 100 levels"),
        ("[" * 100_000, "nested more than 100 levels"),
        ('{"a":' * 200_000, "nested more than 100 levels"),
        ("9" * 5000, "a number of 5000 digits"),
        ("-" + "9" * 41, "a number of 42 digits"),
        ("1e999", "too large"),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"b": {"\\u0061": 1, "a": 2}}', "key 'a' occurs twice"),
        ('"\x1b"', "Invalid control character"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_json_has_limits(text: str, problem: str) -> None:
    with pytest.raises(JsonError, match=problem):
        parse_json(text)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**30), 10**30)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_good_json_is_read_unchanged(value: object) -> None:
    assert parse_json(json.dumps(value)) == json.loads(json.dumps(value))


def test_depth_is_counted_in_values_not_in_brackets() -> None:
    assert len(parse_json(json.dumps([[]] * 500))) == 500
    assert parse_json("[" * 100 + "]" * 100) is not None


def test_a_json_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(ConfigError, match=r"a\.json:2: not valid JSON: Expecting value; get another"):
        read_json(path, 100, ConfigError, "get another")
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must be a JSON object; get another"):
        read_json(path, 100, ConfigError, "get another")
    assert read_record(path) is None and read_record(tmp_path / "none") is None
    path.write_text('{"prompt": "\x7f"}')
    assert read_record(path) == {"prompt": "\x7f"}
    assert stat.S_ISREG(path.stat().st_mode)
