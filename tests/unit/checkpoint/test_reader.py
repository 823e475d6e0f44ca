"""Reading weight files: every format gives the same tensors, every defect one clear CheckpointError."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "ids": torch.tensor([[1, 2], [3, 4]]),
}


def assert_same(files: TensorFiles) -> None:
    assert set(files.keys()) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert files.shape(key) == tuple(tensor.shape)
        assert files.dtype(key) == tensor.dtype
        assert torch.equal(files.load(key), tensor)


def error_of(paths) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorFiles(paths)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    save_file(TENSORS, root / "x.safetensors")
    torch.save(TENSORS, root / "x.pth")
    torch.save(TENSORS, root / "legacy.pth", _use_new_zipfile_serialization=False)
    return root


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "legacy.pth"])
def test_every_format_gives_the_same_tensors(folder, name):
    with TensorFiles(folder / name) as files:
        assert_same(files)


def test_loaded_tensors_are_not_tied_to_the_file(folder, tmp_path):
    for name in ("x.safetensors", "x.pth"):
        path = shutil.copy(folder / name, tmp_path)
        with TensorFiles(path) as files:
            loaded = files.load("a.weight")
            loaded += 1
            assert torch.equal(files.load("a.weight"), TENSORS["a.weight"])
        os.truncate(path, 0)
        assert torch.equal(loaded, TENSORS["a.weight"] + 1)


def test_transposed_and_shared_tensors(tmp_path):
    base = torch.randn(4, 6)
    torch.save({"t": base.T, "row": base[1], "p": torch.nn.Parameter(base)}, tmp_path / "views.pt")
    with TensorFiles(tmp_path / "views.pt") as files:
        assert torch.equal(files.load("t"), base.T)
        assert files.load("t").is_contiguous()
        assert torch.equal(files.load("row"), base[1])
        assert not files.load("p").requires_grad


def test_bytes_are_read_from_any_place(folder, tmp_path):
    """Staging reads tensors in pieces; a transposed one is put in order first."""
    base = torch.randn(4, 6)
    torch.save({"t": base.T, "row": base[1]}, tmp_path / "views.pt")
    for path, key, whole in (
        (folder / "x.pth", "a.weight", TENSORS["a.weight"]),
        (folder / "legacy.pth", "a.weight", TENSORS["a.weight"]),
        (tmp_path / "views.pt", "t", base.T),
        (tmp_path / "views.pt", "row", base[1]),
    ):
        piece = torch.empty(12, dtype=torch.uint8)
        with TensorFiles(path) as files:
            files.read(key, 4, piece)
        assert torch.equal(piece.view(torch.float32), whole.flatten()[1:4])


def split(root: Path, names=("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")) -> list[Path]:
    keys = sorted(TENSORS)
    root.mkdir(exist_ok=True)
    for name, chosen in zip(names, (keys[:2], keys[2:]), strict=True):
        save_file({key: TENSORS[key] for key in chosen}, root / name)
    return [root / name for name in names]


def test_shards(tmp_path):
    shards = split(tmp_path)
    with TensorFiles(shards) as files:
        assert_same(files)
    with TensorFiles([str(path) for path in reversed(shards)]) as files:
        assert_same(files)


def test_missing_shard_of_a_numbered_set(tmp_path):
    first, second = split(tmp_path / "Wan2.1-T2V-14B")
    message = error_of([first])
    assert str(second) in message and "list it too" in message
    second.unlink()
    message = error_of([first])
    assert str(second) in message and "omniavatar download 14B" in message


def write_index(root: Path, shards: list[Path], name="model.safetensors.index.json") -> Path:
    weight_map = {key: shards[0 if key in sorted(TENSORS)[:2] else 1].name for key in TENSORS}
    (root / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root / name


def test_index_and_folder(tmp_path):
    index = write_index(tmp_path, split(tmp_path))
    for path in (index, tmp_path):
        with TensorFiles(path) as files:
            assert_same(files)


def test_missing_shard_of_an_index(tmp_path):
    shards = split(tmp_path, ("one.safetensors", "two.safetensors"))
    index = write_index(tmp_path, shards)
    shards[1].unlink()
    assert "two.safetensors" in error_of(index)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "../one.safetensors"}}',
        '{"weight_map": {"a": "/one.safetensors"}}',
        "[" * 5000,
    ],
)
def test_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "index" in error_of(tmp_path)


def test_hugging_face_folders(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "pytorch_model.pt"):
        root = tmp_path / name.replace(".", "_")
        root.mkdir()
        torch.save(TENSORS, root / name) if "pytorch" in name else save_file(TENSORS, root / name)
        with TensorFiles(root) as files:
            assert_same(files)
    assert "no weight file" in error_of(tmp_path)


def test_duplicated_key(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"same": torch.zeros(1)}, tmp_path / name)
    assert "same is stored twice" in error_of([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_missing_file_names_the_remedy(tmp_path):
    assert "omniavatar download 1.3B" in error_of(tmp_path / "OmniAvatar-1.3B" / "pytorch_model.pt")
    assert "no weight file is given" in error_of([])
    (tmp_path / "weights.txt").touch()
    assert "unknown type of weight file" in error_of(tmp_path / "weights.txt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "legacy.pth"])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.9, -7])
def test_truncated(folder, tmp_path, name, keep):
    data = (folder / name).read_bytes()
    kept = data[: int(len(data) * keep)] if 0 < keep < 1 else data[:keep]
    (tmp_path / name).write_bytes(kept)
    message = error_of(tmp_path / name)
    assert str(tmp_path / name) in message and "damaged" in message


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_garbage_and_trailing_bytes(folder, tmp_path, name):
    (tmp_path / name).write_bytes(b"<!DOCTYPE html>" * 40)
    assert "damaged" in error_of(tmp_path / name)
    if name.endswith("safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes() + b"x")
        assert "damaged" in error_of(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(tmp_path, legacy):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save(
        {"a": torch.zeros(1), "b": Evil()}, tmp_path / "e.pt", _use_new_zipfile_serialization=not legacy
    )
    message = error_of(tmp_path / "e.pt")
    assert "pickled code" in message and "mkdir" in message
    assert not (tmp_path / "owned").exists()


def test_wrong_content(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "not a mapping" in error_of(tmp_path / "list.pt")
    torch.save({"a": torch.zeros(1), "epoch": 3}, tmp_path / "mixed.pt")
    assert "'epoch'" in error_of(tmp_path / "mixed.pt")


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
@pytest.mark.parametrize("legacy", [False, True])
def test_tables_of_training_tools_are_opened(tmp_path, name, legacy):
    content = {name: {"state_dict": TENSORS}, "epoch": 3, "optimizer_states": []}
    torch.save(content, tmp_path / "t.ckpt", _use_new_zipfile_serialization=not legacy)
    with TensorFiles(tmp_path / "t.ckpt") as files:
        assert_same(files)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_names_lose_the_parts_of_wrappers(tmp_path, prefix):
    save_file({prefix + key: value for key, value in TENSORS.items()}, tmp_path / "w.safetensors")
    with TensorFiles(tmp_path / "w.safetensors") as files:
        assert_same(files)
    save_file({f"blocks.0.{prefix}q": torch.ones(2)}, tmp_path / "w.safetensors")
    with TensorFiles(tmp_path / "w.safetensors") as files:
        assert files.load("blocks.0.q").sum() == 2
    save_file({"a": torch.ones(2), f"{prefix}a": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert "a is stored twice" in error_of(tmp_path / "w.safetensors")


def test_unsupported_dtype(folder, tmp_path):
    data = (folder / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data.replace(b'"F16"', b'"Q16"'))
    assert "Q16" in error_of(tmp_path / "x.safetensors")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_any_damaged_header_byte_is_an_error_or_harmless(folder, tmp_path, position, value):
    data = bytearray((folder / "x.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[position % header] = value
    (tmp_path / "fuzzed.safetensors").write_bytes(data)
    try:
        with TensorFiles(tmp_path / "fuzzed.safetensors") as files:
            for key in files.keys():  # noqa: SIM118
                files.load(key)
    except CheckpointError:
        pass
