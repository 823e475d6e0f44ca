"""Weight files from strangers: every wrong header or record is one line of CheckpointError, and no number is
read that the file does not hold."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def problem(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, TensorFiles(path) as files:
        for key in files.keys():  # noqa: SIM118
            files.load(key)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 1000
    assert message.isprintable()
    return message


def safetensors(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


HEADERS = {
    "infinite shape": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}',
    "NaN shape": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "float shape": {"a": ENTRY | {"shape": [2.0]}},
    "true shape": {"a": ENTRY | {"shape": [True, 2]}},
    "text shape": {"a": ENTRY | {"shape": "2"}},
    "negative shape": {"a": ENTRY | {"shape": [-1, -2]}},
    "deep shape": {"a": ENTRY | {"shape": [[2]]}},
    "many axes": {"a": ENTRY | {"shape": [1] * 70 + [2]}},
    "huge shape": {"a": ENTRY | {"shape": [0, 10**30], "data_offsets": [0, 0]}},
    "overflowing shape": {"a": ENTRY | {"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
    "endless integer": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
    "float offsets": {"a": ENTRY | {"data_offsets": [0.0, 8.0]}},
    "negative offsets": {"a": ENTRY | {"data_offsets": [-8, 0]}},
    "one offset": {"a": ENTRY | {"data_offsets": [0]}},
    "three offsets": {"a": ENTRY | {"data_offsets": [0, 8, 8]}},
    "mixed offsets": {"a": ENTRY, "b": ENTRY | {"data_offsets": ["0", 8]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
    "gap": {"a": ENTRY | {"data_offsets": [8, 16]}},
    "beyond the end": {"a": ENTRY | {"shape": [4], "data_offsets": [0, 16]}},
    "wrong size": {"a": ENTRY | {"shape": [3]}},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype of a list": {"a": ENTRY | {"dtype": ["F32"]}},
    "unknown dtype": {"a": ENTRY | {"dtype": "Q4\x1b[31m"}},
    "entry of a list": {"a": [1, 2]},
    "whole metadata": {"__metadata__": 5, "a": ENTRY},
    "numbers in metadata": {"__metadata__": {"x": 5}, "a": ENTRY},
    "twice the same name": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}',
    "control characters": {"\x1b[31mEVIL\x07": ENTRY},
    "half an emoji": {"\ud83d": ENTRY},
    "long name": {"a" * 5000: ENTRY},
    "no name": {"": ENTRY},
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "list": [],
    "not UTF-8": b'{"\xff\xfe": 1}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_wrong_header_of_safetensors(tmp_path: Path, name: str) -> None:
    problem(safetensors(tmp_path / "a.safetensors", HEADERS[name]))


def test_a_right_header_beside_the_wrong_ones(tmp_path: Path) -> None:
    data = np.array([1.5, -2], np.float32).tobytes()
    extra = {
        "__metadata__": {"note": "x"},
        "a": ENTRY,
        "none": ENTRY | {"shape": [0], "data_offsets": [8, 8]},
    }
    with TensorFiles(safetensors(tmp_path / "a.safetensors", extra, data)) as files:
        assert files.load("a").tolist() == [1.5, -2] and files.load("none").shape == (0,)
        assert files.metadata == {"note": "x"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_no_regular_file(tmp_path: Path, suffix: str) -> None:
    """A FIFO without a writer and an endless device are refused at once."""
    os.mkfifo(tmp_path / f"fifo{suffix}")
    assert "not a regular file" in problem(tmp_path / f"fifo{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    assert "not a regular file" in problem(tmp_path / f"zero{suffix}")
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    assert "cannot be read" in problem(tmp_path / f"loop{suffix}")
    assert "cannot be read" in problem(tmp_path / ("n" * 300 + suffix))


def rewritten(path: Path, change: str, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save whose records are packed again, with one change."""
    weights = {"a": torch.arange(8.0), "b": torch.arange(64.0)}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data/0"):
                if change == "missing":
                    continue
                content = {"cut": content[:4], "long": content + bytes(32)}.get(change, content)
            if entry.filename.endswith("byteorder") and change == "big-endian":
                content = b"big"
            new.writestr(entry.filename, content)
            if change == "twice" and entry.filename.endswith("data/0"):
                with pytest.warns(UserWarning, match="Duplicate"):
                    new.writestr(entry.filename, content)
    return path


def test_packed_again_without_a_change(tmp_path: Path) -> None:
    with TensorFiles(rewritten(tmp_path / "a.pth", "")) as files:
        assert torch.equal(files.load("a"), torch.arange(8.0))
        assert torch.equal(files.load("b"), torch.arange(64.0))


@pytest.mark.parametrize("change", ["cut", "long", "missing", "twice", "big-endian"])
def test_records_that_do_not_fit_their_tensors(tmp_path: Path, change: str) -> None:
    problem(rewritten(tmp_path / "a.pth", change))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records(tmp_path: Path, method: int) -> None:
    assert "compressed" in problem(rewritten(tmp_path / "a.pth", "", method))


def test_tensors_that_are_not_plain(tmp_path: Path) -> None:
    base = torch.zeros(2, 3)
    odd = {
        "expanded": torch.zeros(1).expand(1000),
        "complex64": torch.zeros(2, dtype=torch.complex64),
        "sparse": base.to_sparse(),
        "without data": torch.zeros(2, device="meta"),
    }
    for name, tensor in odd.items():
        torch.save({name: tensor}, tmp_path / "odd.pt")
        assert name.split("_")[0] in problem(tmp_path / "odd.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.quantize_per_tensor(base, 0.1, 0, torch.quint8)}, tmp_path / "odd.pt")
        problem(tmp_path / "odd.pt")
    torch.save({"a\x1b[31m": base}, tmp_path / "odd.pt")
    assert "impossible name" in problem(tmp_path / "odd.pt")
    torch.save({3: base}, tmp_path / "odd.pt")
    assert "impossible name" in problem(tmp_path / "odd.pt")


def test_older_form_without_the_data_of_a_tensor(tmp_path: Path) -> None:
    """torch leaves the memory of such a tensor as it is; its list of data blocks is the last pickle."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    start = content.rindex(b"\x80\x02]q\x00")
    path.write_bytes(content[:start] + b"\x80\x02]q\x00.")
    assert "lacks the data" in problem(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5).bfloat16()}
    path = tmp_path_factory.mktemp("whole") / "x.pt"
    files = {}
    for legacy in (False, True):
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
        files["legacy" if legacy else "zip"] = path.read_bytes()
    return files


@pytest.mark.parametrize("value", [0, 1, 128, 255])
def test_any_byte_at_the_end_of_a_zip(whole: dict[str, bytes], tmp_path: Path, value: int) -> None:
    """Sizes and places of the list of records: negative, beyond the file, of another record."""
    path = tmp_path / "a.pt"
    for position in range(1, 160):
        data = bytearray(whole["zip"])
        data[-position] = value
        path.write_bytes(data)
        try:
            with TensorFiles(path) as files:
                assert files.load("a.weight").sum() == 66
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), piece=st.binary(min_size=1, max_size=6), cut=st.booleans())
def test_any_damage_of_a_pickle_is_an_error_or_harmless(
    whole: dict[str, bytes], tmp_path: Path, form: str, position: int, piece: bytes, cut: bool
) -> None:
    data = bytearray(whole[form])
    position %= len(data)
    data[position : position + len(piece)] = piece
    path = tmp_path / "fuzzed.pt"
    path.write_bytes(data[: position + len(piece)] if cut else data)
    try:
        with TensorFiles(path) as files:
            for key in files.keys():  # noqa: SIM118
                files.load(key)
    except CheckpointError as error:
        assert "\n" not in str(error)
