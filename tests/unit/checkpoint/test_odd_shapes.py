"""Files with the right names and odd shapes or settings: one line of CheckpointError, no hang, no model of
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from omniavatar.checkpoint.dit import DiTFiles, load_dit
from omniavatar.checkpoint.dit_sizes import inspect_dit, read_adapter_config
from omniavatar.checkpoint.layout import TextSpec, dit_tensors, text_tensors
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.tiny_decoder import load_tiny_decoder, tiny_decoder_tensors
from omniavatar.checkpoint.vae import load_vae
from omniavatar.encoders.text import TextEncoder
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import DiTConfig, VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoderConfig
from tiny_tokenizer import write_tokenizer

DIT = DiTConfig(128, 48, 1, 2, text_dim=24, freq_dim=16, audio_dim=20)
FILES: dict[str, dict[str, tuple[int, ...]]] = {
    "dit": dict(dit_tensors(DIT)),
    "vae": dict(vae_tensors(VAEConfig(dim=8))),
    "tiny": dict(tiny_decoder_tensors(TinyDecoderConfig((16, 16, 8, 8)))),
    "text": dict(text_tensors(TextSpec(260, 32, 48, 4, 2, 16))),
}


@pytest.fixture(scope="module")
def loaders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], object]]:
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    to = {"dtype": torch.float32, "device": "cpu"}
    attention = torch.nn.functional.scaled_dot_product_attention
    return {
        "dit": lambda path: load_dit(DiTFiles(path), attention=attention, **to),  # type: ignore[arg-type]
        "vae": lambda path: load_vae(path, **to),  # type: ignore[arg-type]
        "tiny": lambda path: load_tiny_decoder(path, raw_latents=False, z_dim=16, **to),  # type: ignore[arg-type]
        "text": lambda path: TextEncoder.load(path, tokenizer, "cpu", torch.float32),
    }


@pytest.mark.parametrize("kind", FILES)
def test_the_unchanged_shapes_load(loaders, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in FILES[kind].items()}, path)
    assert loaders[kind](path) is not None


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_shape_is_an_error(loaders, tmp_path: Path, kind: str, data: st.DataObject) -> None:
    shapes = dict(FILES[kind])
    key = data.draw(st.sampled_from(sorted(shapes)))
    old = shapes[key]
    new = data.draw(st.lists(st.integers(0, 5), max_size=6).map(tuple).filter(lambda shape: shape != old))
    path = tmp_path / "m.safetensors"
    save_file({name: torch.zeros(new if name == key else shape) for name, shape in shapes.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        loaders[kind](path)
    assert "\n" not in str(caught.value) and "m.safetensors" in str(caught.value)


@pytest.mark.parametrize("kind", ["dit", "text"])
def test_a_block_number_beyond_the_others(loaders, tmp_path: Path, kind: str) -> None:
    """The number of blocks is not taken from one name: a model of a billion blocks would never be built."""
    tensors = {key: torch.zeros(shape) for key, shape in FILES[kind].items()}
    save_file(tensors | {"blocks.999999999.x.weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"has no weights of block 2"):
        loaders[kind](tmp_path / "m.safetensors")


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    tensors = {key: torch.zeros(shape) for key, shape in FILES["dit"].items()}
    kept = {key: value for key, value in tensors.items() if not key.startswith("blocks.1.")}
    renamed = {key.replace("blocks.0.", "blocks.1."): value for key, value in kept.items()}
    save_file(kept | {f"blocks.2.{key}": torch.zeros(1) for key in "ab"}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="has no weights of block 1"):
        inspect_dit(tmp_path / "m.safetensors")
    save_file(renamed, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="has no weights of block 0"):
        inspect_dit(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "table",
    [
        {"lora_rank": "8"},
        {"lora_rank": 8.5},
        {"lora_rank": True},
        {"lora_rank": -1},
        {"lora_rank": [8]},
        {"lora_alpha": "4"},
        {"lora_alpha": 0},
        {"model_config": [1]},
        {"model_config": "x"},
        {"model_config": {"num_heads": "4"}},
        {"model_config": {"num_heads": -4}},
        {"model_config": {"num_heads": 10**12}},
    ],
    ids=str,
)
def test_settings_of_an_adapter(tmp_path: Path, table: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="not a valid adapter configuration") as caught:
        read_adapter_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 5000, "\xff"])
def test_unreadable_settings_of_an_adapter(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_adapter_config(tmp_path)
    assert "\n" not in str(caught.value)
