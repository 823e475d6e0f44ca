"""Weights that are not finite are refused when they are loaded, and the message names the tensor at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from omniavatar.accel.apply import AccelConfig, row_dtype, weight_form
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.checkpoint.convert import convert_dit
from omniavatar.checkpoint.dit import DiTFiles, LoraFile, load_dit, open_dit
from omniavatar.checkpoint.finite import is_finite
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.checkpoint.strict import file_sources, load_strict
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import DiTConfig

CPU = torch.device("cpu")
KEY = "blocks.0.cross_attn.k"


def load(path: Path, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    with TensorFiles(path) as files:
        load_strict(module, file_sources(files), dtype=dtype, device="cpu", origin=files.origin)
    return module


def problem(act: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_of_a_file(tmp_path, value, stored, dtype):
    weight = torch.ones(2, 3, dtype=stored)
    weight[1, 2] = value
    path = tmp_path / "a.safetensors"
    save_file({"weight": weight, "bias": torch.zeros(2)}, path)
    message = problem(lambda: load(path, dtype))
    assert message.startswith(f"{path}: weight holds NaN or infinite numbers")


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "works"),
    [
        (7e4, torch.float32, torch.float16, torch.bfloat16),
        (3.4e38, torch.float32, torch.bfloat16, torch.float32),
        (1e39, torch.float64, torch.float32, None),
        (7e4, torch.float32, torch.float8_e5m2, torch.bfloat16),
    ],
)
def test_overflow_in_the_final_dtype(tmp_path, value, stored, dtype, works):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.full((2, 3), value, dtype=stored), "bias": torch.zeros(2)}, path)
    message = problem(lambda: load(path, dtype))
    assert str(path) in message and "weight is not finite" in message and str(dtype)[6:] in message
    if works is not None:
        assert load(path, works).weight[0, 0] == torch.tensor(value).to(works)
    if dtype is torch.float16:
        assert "set dtype=bfloat16" in message


def test_large_sums_of_finite_numbers_are_finite(tmp_path):
    """The sum overflows, the numbers do not."""
    path = tmp_path / "a.safetensors"
    weight = torch.full((2, 3), 3e38)
    save_file({"weight": weight, "bias": torch.zeros(2)}, path)
    assert torch.equal(load(path, torch.float32).weight, weight)
    assert load(path, torch.bfloat16).weight.isfinite().all()
    assert is_finite(torch.full((1000,), 6e4, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
@given(bits=st.integers(0, 65535))
def test_every_pattern_of_bits(dtype, bits):
    kind = torch.uint8 if dtype.itemsize == 1 else torch.uint16
    pattern = torch.tensor([0, bits % (256**dtype.itemsize)]).to(kind).view(dtype)
    assert is_finite(pattern) == bool(pattern.float().isfinite().all())


@pytest.mark.parametrize("stored", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_no_weights(tmp_path, stored):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(2, 3).to(stored), "bias": torch.zeros(2)}, path)
    assert "weight holds numbers of" in problem(lambda: load(path, torch.float32))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model with one block, 40 KB."""
    from omniavatar.checkpoint.initial import random_weight
    from omniavatar.checkpoint.layout import dit_tensors

    config = DiTConfig(128, 64, 1, 1, text_dim=16, freq_dim=16)
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(
        {key: random_weight(key, shape, torch.float32, generator) for key, shape in dit_tensors(config)}, path
    )
    return path


def lora(path: Path, layer: str = KEY, **values: float) -> Path:
    pair = {"lora_A.weight": torch.full((1, 128), 1e-3), "lora_B.weight": torch.full((128, 1), 1e-3)}
    for role, value in values.items():
        key = next(key for key in pair if role in key)
        pair[key][0, 0] = value
    save_file({f"{layer}.{role}": tensor for role, tensor in pair.items()}, path)
    return path


def merge(base: Path, path: Path, dtype: torch.dtype = torch.float32, strength: float = 1.0, form=None):
    attention = create_attention("sdpa", CPU, torch.float32)[1]
    files = DiTFiles(base, loras=[LoraFile(path, strength)])
    return load_dit(files, attention=attention, dtype=dtype, device="cpu", form=form)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_a_lora_is_named_not_the_base(base, tmp_path, role, value):
    path = lora(tmp_path / "lora.safetensors", **{role: value})
    message = problem(lambda: merge(base, path))
    assert message.startswith(f"{path}: {KEY}.{role}.weight holds NaN")


def test_a_lora_that_overflows_when_it_is_merged(base, tmp_path):
    path = lora(tmp_path / "lora.safetensors", lora_A=1e30, lora_B=1e30)
    message = problem(lambda: merge(base, path))
    assert f"{KEY}.weight is not finite in the model" in message and "strength of the LoRAs" in message
    path = lora(tmp_path / "lora.safetensors", lora_A=1e3, lora_B=1e3)
    assert "set dtype=bfloat16" in problem(lambda: merge(base, path, torch.float16))
    assert merge(base, path, torch.bfloat16) is not None
    assert merge(base, path, torch.float16, strength=0.01) is not None


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_quantised_weights(base, tmp_path, form):
    form = weight_form(AccelConfig(form), create_fused(CPU, row_dtype(form)), CPU)
    path = lora(tmp_path / "lora.safetensors", "blocks.0.self_attn.q", lora_B=float("nan"))
    assert str(path) in problem(lambda: merge(base, path, form=form))
    assert merge(base, lora(path, "blocks.0.self_attn.q"), form=form) is not None


def test_conversion_writes_no_file(base, tmp_path):
    path = lora(tmp_path / "lora.safetensors", lora_B=float("nan"))
    attention = create_attention("sdpa", CPU, torch.float32)[1]
    files = DiTFiles(base, loras=[LoraFile(path)])
    out = tmp_path / "out" / "merged.safetensors"
    with open_dit(files, attention=attention, dtype=torch.float32, device=CPU) as weights:
        message = problem(lambda: convert_dit(weights, out, form=None, made_from={}))
    assert str(path) in message and not list(out.parent.iterdir())


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), [1.0, 2.0], [], True])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_alpha_must_be_one_finite_number(base, tmp_path, alpha, suffix):
    path = lora(tmp_path / "lora.safetensors")
    tensors = load_file(path) | {f"{KEY}.alpha": torch.tensor(alpha)}
    path = path.with_suffix(suffix)
    torch.save(tensors, path) if suffix == ".pt" else save_file(tensors, path)
    assert f"{path}: {KEY}.alpha must be one finite number" in problem(lambda: merge(base, path))


@pytest.mark.parametrize("alpha", [[1.0], 1, 1.0])
def test_alpha_of_one_number_in_any_form(base, tmp_path, alpha):
    path = lora(tmp_path / "lora.safetensors")
    plain = merge(base, path).blocks[0].cross_attn.k.weight
    save_file(load_file(path) | {f"{KEY}.alpha": torch.tensor(alpha)}, path)
    assert torch.equal(merge(base, path).blocks[0].cross_attn.k.weight, plain)
