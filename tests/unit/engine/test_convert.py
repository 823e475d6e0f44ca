"""Conversion to one merged file, quantising while loading, and reading through staging buffers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tests.engine import make_pipeline, overrides, request

from omniavatar.accel.apply import AccelConfig, row_dtype, weight_form
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.kernels.rows import EagerOps, quantize_rows
from omniavatar.accel.quantized import QuantLinear, apply_quantization
from omniavatar.checkpoint.dit import FORM_KEY, DiTFiles, LoraFile, load_dit, random_dit
from omniavatar.checkpoint.dit_sizes import HEADS_KEY, inspect_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.staging import Staging
from omniavatar.config.load import load_config
from omniavatar.engine.convert import convert_checkpoint
from omniavatar.errors import CheckpointError, OutputError
from omniavatar.model.dit import WanDiT

CPU = torch.device("cpu")
ATTENTION = create_attention("sdpa", CPU, torch.float32)[1]
FLOAT8 = weight_form(AccelConfig("fp8"), EagerOps(), CPU)


def files_of(checkpoint: Path, **options) -> DiTFiles:
    base = checkpoint / "Wan2.1-T2V-nano" / "diffusion_pytorch_model.safetensors"
    return DiTFiles(base, checkpoint / "OmniAvatar-nano", **options)


def load(files: DiTFiles, dtype=torch.bfloat16, form=None, device_of=None) -> WanDiT:
    return load_dit(files, attention=ATTENTION, dtype=dtype, device="cpu", form=form, device_of=device_of)


def converted(checkpoint: Path, out: Path, tmp_path: Path, **changes) -> Path:
    config = load_config(None, overrides(checkpoint, tmp_path / "cache", **changes)).config
    return convert_checkpoint(config, out).path


def same_weights(a: WanDiT, b: WanDiT) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return all(
        value.dtype == theirs[key].dtype and torch.equal(value.float(), theirs[key].float())
        for key, value in ours.items()
    )


def test_float8_while_loading_quantises_the_float32_sum(nano_checkpoint):
    exact = load(files_of(nano_checkpoint), torch.float32).state_dict()
    quantised = load(files_of(nano_checkpoint), form=FLOAT8)
    layer = quantised.blocks[1].ffn[2]
    assert isinstance(layer, QuantLinear) and layer.dtype == torch.bfloat16
    rows = quantize_rows(exact["blocks.1.ffn.2.weight"])
    assert torch.equal(layer.weight.float(), rows.data.float())
    assert torch.equal(layer.weight_scale, rows.scale)
    assert quantised.blocks[1].cross_attn.k.weight.dtype == torch.bfloat16


def test_random_float8_weights_are_those_of_the_plain_model():
    spec = scale_spec("nano").dit
    options = {"attention": ATTENTION, "dtype": torch.bfloat16, "device": "cpu", "seed": 0}
    plain = random_dit(spec, **options)
    apply_quantization(plain, EagerOps())
    assert same_weights(random_dit(spec, form=FLOAT8, **options), plain)


def test_every_weight_is_read_to_the_device_of_its_key(nano_checkpoint):
    keys: list[str] = []

    def device_of(key: str) -> torch.device:
        keys.append(key)
        return CPU

    loaded = load(files_of(nano_checkpoint), form=FLOAT8, device_of=device_of)
    assert sorted(keys) == sorted(loaded.state_dict())
    assert "blocks.1.ffn.0.weight_scale" in keys


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
def test_converted_file_is_the_merged_model(nano_checkpoint, tmp_path, quantize):
    out = converted(
        nano_checkpoint, tmp_path / "new" / "one.safetensors", tmp_path, quantize=quantize, dtype="bf16"
    )
    form = weight_form(AccelConfig(quantize), EagerOps(row_dtype(quantize)), CPU)
    assert same_weights(load(DiTFiles(out), form=form), load(files_of(nano_checkpoint), form=form))
    assert inspect_dit(out) == scale_spec("nano").dit
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata.get(FORM_KEY) == (None if form is None else quantize)
    assert json.loads(metadata["omniavatar.sources"])["adapter"] == "OmniAvatar-nano"


def test_video_of_a_converted_checkpoint_is_the_same(nano_checkpoint, tmp_path):
    changes = {"quantize": "fp8", "dtype": "bf16"}
    out = converted(nano_checkpoint, tmp_path / "one.safetensors", tmp_path, **changes)
    cache = tmp_path / "cache"

    def frames(**more):
        chunks = make_pipeline(nano_checkpoint, cache, **changes, **more).stream(request())
        return [chunk.frames for chunk in chunks]

    before, after = frames(), frames(dit_path=str(out), exp_path=None)
    assert len(before) > 1
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_converted_file_keeps_the_number_of_heads(nano_checkpoint, tmp_path):
    out = converted(nano_checkpoint, tmp_path / "h.safetensors", tmp_path, model_config={"num_heads": 4})
    assert inspect_dit(out).num_heads == 4
    assert inspect_dit(out, num_heads=8).num_heads == 8


def test_random_weights_can_be_converted(tmp_path):
    config = load_config(None, {"weights": "random", "scale": "nano", "quantize": "fp8", "device": "cpu"})
    out = convert_checkpoint(config.config, tmp_path / "random.safetensors").path
    expected = random_dit(
        scale_spec("nano").dit, attention=ATTENTION, dtype=torch.bfloat16, device="cpu", seed=0, form=FLOAT8
    )
    assert same_weights(load(DiTFiles(out), form=FLOAT8), expected)


def test_wrong_use_of_a_converted_file_is_an_error(nano_checkpoint, tmp_path):
    out = converted(nano_checkpoint, tmp_path / "one.safetensors", tmp_path, quantize="fp8")
    with pytest.raises(CheckpointError, match=r"one.safetensors: was converted to fp8; set quantize=fp8"):
        load(DiTFiles(out))
    adapter = nano_checkpoint / "OmniAvatar-nano"
    for files in (DiTFiles(out, adapter), DiTFiles(out, loras=[LoraFile(adapter)])):
        with pytest.raises(
            CheckpointError, match="no adapter or LoRA can be merged; remove exp_path and loras"
        ):
            load(files, form=FLOAT8)


def test_failed_conversion_leaves_no_file(nano_checkpoint, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="must have the extension"):
        converted(nano_checkpoint, tmp_path / "one.pt", tmp_path)
    full = tmp_path / "full" / "one.safetensors"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"needs 0.0 GB|needs"):
        converted(nano_checkpoint, full, tmp_path)
    monkeypatch.undo()

    def failing(files: TensorFiles, key: str, read: Callable = TensorFiles.load) -> torch.Tensor:
        if key == "blocks.1.ffn.2.weight":
            raise OSError(28, "No space left on device")
        return read(files, key)

    monkeypatch.setattr(TensorFiles, "load", failing)
    monkeypatch.setattr("omniavatar.checkpoint.dit.TensorFiles.load", failing)
    with pytest.raises(OutputError, match="No space left"):
        converted(nano_checkpoint, full, tmp_path)
    assert not list(full.parent.glob("*"))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5),
    chunk=st.integers(1, 400),
    suffix=st.sampled_from(["safetensors", "pt"]),
)
def test_staging_gives_the_stored_bytes(tmp_path_factory, sizes, chunk, suffix):
    path = tmp_path_factory.mktemp("staging") / f"weights.{suffix}"
    tensors = {f"t{i}": torch.randn(size).to(torch.bfloat16) for i, size in enumerate(sizes)}
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    with TensorFiles(path) as files, Staging(CPU, chunk) as staging:
        for key, tensor in tensors.items():
            assert torch.equal(staging.load(files, key), tensor)


def test_staging_reads_large_tensors_in_parts(tmp_path):
    tensor = torch.arange(1_500_000, dtype=torch.int32).view(1500, 1000)
    save_file({"large": tensor}, tmp_path / "a.safetensors")
    torch.save({"turned": tensor.t()}, tmp_path / "b.pt")
    with Staging(CPU, 2_000_001) as staging:
        with TensorFiles(tmp_path / "a.safetensors") as files:
            assert torch.equal(staging.load(files, "large"), tensor)
        with TensorFiles(tmp_path / "b.pt") as files:
            assert torch.equal(staging.load(files, "turned"), tensor.t())


def test_header_has_the_number_of_heads(nano_checkpoint, tmp_path):
    out = converted(nano_checkpoint, tmp_path / "one.safetensors", tmp_path)
    with TensorFiles(out) as files:
        assert files.metadata[HEADS_KEY] == "2"
