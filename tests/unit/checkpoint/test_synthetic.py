"""Synthetic checkpoints: official layout, equal bytes for equal seeds, readable by every loader."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.layout_files import checkpoint_layout
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.synthetic import make_checkpoint
from omniavatar.checkpoint.tensor_writer import write_random
from omniavatar.errors import ConfigError, OutputError

NANO = scale_spec("nano")
SIDE_FILES = (
    "Wan2.1-T2V-nano/config.json",
    "Wan2.1-T2V-nano/google/umt5-xxl/special_tokens_map.json",
    "Wan2.1-T2V-nano/google/umt5-xxl/tokenizer.json",
    "Wan2.1-T2V-nano/google/umt5-xxl/tokenizer_config.json",
    "OmniAvatar-nano/config.json",
    "wav2vec2-base-960h/config.json",
    "wav2vec2-base-960h/preprocessor_config.json",
)


def test_files_are_exactly_the_layout(nano_checkpoint):
    found = {str(path.relative_to(nano_checkpoint)) for path in nano_checkpoint.rglob("*") if path.is_file()}
    assert found == {layout.path for layout in checkpoint_layout(NANO)} | set(SIDE_FILES)
    for layout in checkpoint_layout(NANO):
        with TensorFiles(nano_checkpoint / layout.path) as files:
            assert set(files.keys()) == {entry.key for entry in layout.tensors}
            for entry in layout.tensors:
                assert (files.shape(entry.key), files.dtype(entry.key)) == (entry.shape, entry.dtype)
                assert files.load(entry.key).float().isfinite().all()


def test_safetensors_library_reads_our_files(nano_checkpoint):
    for layout in checkpoint_layout(NANO):
        if layout.format == "safetensors":
            with (
                safe_open(nano_checkpoint / layout.path, framework="pt") as theirs,
                TensorFiles(nano_checkpoint / layout.path) as ours,
            ):
                assert theirs.metadata() == {"format": "pt"}
                for entry in layout.tensors:
                    assert torch.equal(theirs.get_tensor(entry.key), ours.load(entry.key))


def test_same_seed_same_bytes_in_any_order(nano_checkpoint, tmp_path):
    for layout in reversed(checkpoint_layout(NANO)):
        write_random(tmp_path, layout, 0, lambda count: None)
        assert (tmp_path / layout.path).read_bytes() == (nano_checkpoint / layout.path).read_bytes()
    other = checkpoint_layout(NANO)[-1]
    write_random(tmp_path, other, 1, lambda count: None)
    assert (tmp_path / other.path).read_bytes() != (nano_checkpoint / other.path).read_bytes()


def test_tensors_differ_and_spread_as_meant(nano_checkpoint):
    with TensorFiles(nano_checkpoint / "Wan2.1-T2V-nano" / "diffusion_pytorch_model.safetensors") as files:
        q, k = (files.load(f"blocks.0.self_attn.{name}.weight") for name in "qk")
        norm = files.load("blocks.0.self_attn.norm_q.weight")
    assert not torch.equal(q, k)
    assert abs(q.std().item() * 16 - 1) < 0.02 and abs(q.mean().item()) < 1e-3
    assert abs(norm.mean().item() - 1) < 0.01


def test_progress_ends_at_the_total(tmp_path):
    seen: list[tuple[int, int]] = []
    make_checkpoint("nano", tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(layout.num_bytes for layout in checkpoint_layout(NANO))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not list(tmp_path.rglob("*.partial"))


def test_settings_are_those_of_the_release(nano_checkpoint):
    adapter = json.loads((nano_checkpoint / "OmniAvatar-nano" / "config.json").read_text())
    assert adapter["model_config"]["in_dim"] == 33
    assert (adapter["train_architecture"], adapter["use_audio"], adapter["i2v"]) == ("lora", True, True)
    assert (adapter["lora_rank"], adapter["lora_alpha"]) == (8, 4)
    assert adapter["lora_target_modules"] == "q,k,v,o,ffn.0,ffn.2"
    base = json.loads((nano_checkpoint / "Wan2.1-T2V-nano" / "config.json").read_text())
    assert base["num_heads"] == 2 and base["in_dim"] == 16


def test_tokenizer_folder_is_read_by_auto_tokenizer(nano_checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano_checkpoint / "Wan2.1-T2V-nano" / "google" / "umt5-xxl")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    batch = tokenizer(
        ["A man speaks, 你好 é", "x"],
        padding="max_length",
        max_length=40,
        truncation=True,
        return_tensors="pt",
    )
    assert batch.input_ids.shape == (2, 40) and batch.input_ids.max() < NANO.text.vocab
    length = int(batch.attention_mask[0].sum())
    assert batch.input_ids[0, length - 1] == 1 and not batch.input_ids[0, length:].any()
    assert 2 not in batch.input_ids
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True).strip() == "A man speaks, 你好 é"
    long = tokenizer(["word " * 600], padding="max_length", max_length=512, truncation=True)
    assert len(long.input_ids[0]) == 512 and long.input_ids[0][-1] == 1


def test_index_of_the_shards(tmp_path):
    make_checkpoint("nano", tmp_path, shard_bytes=4_000_000)
    base = tmp_path / "Wan2.1-T2V-nano"
    shards = sorted(base.glob("diffusion_pytorch_model-*.safetensors"))
    assert len(shards) == 6
    with TensorFiles(shards) as listed, TensorFiles(base) as indexed:
        assert set(listed.keys()) == set(indexed.keys())
    index = json.loads((base / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 5_396_288 == 21_585_152


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 5 * 10**9))
    with pytest.raises(OutputError, match=r"14B checkpoint needs 71\.9 GB, but the disk has 5\.00 GB free"):
        make_checkpoint("14B", tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_unwritable_output(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        make_checkpoint("nano", tmp_path / "file")


def test_disk_filling_up_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        make_checkpoint("nano", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        "diffusion_pytorch_model.safetensors"
    ]


def test_unknown_scale(tmp_path):
    with pytest.raises(ConfigError):
        make_checkpoint("2B", Path(tmp_path))
