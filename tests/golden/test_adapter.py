"""OmniAvatar's adapter merged into its base gives the recorded output; keys have the official names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compare import dit_config, relative_error, under
from safetensors.torch import save_file

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.dit import DiTFiles, load_dit
from omniavatar.checkpoint.dit_sizes import inspect_dit
from omniavatar.checkpoint.layout import (
    TextSpec,
    Wav2VecSpec,
    adapter_tensors,
    dit_tensors,
    text_tensors,
    wav2vec_tensors,
)
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.vae import inspect_vae
from omniavatar.encoders.audio import library_key
from omniavatar.model.sizes import VAEConfig

ATTENTION = create_attention("sdpa", torch.device("cpu"), torch.float32)[1]


def write(golden, folder: Path, *, default: bool = True, alpha: float | None = None) -> tuple[Path, Path]:
    """The recording as user files: base as safetensors, adapter as pytorch_model.pt and config.json."""
    tensors, metadata = golden("adapter.safetensors")
    adapter = under(tensors, "adapter.")
    if not default:
        adapter = {key.replace(".default", ""): value for key, value in adapter.items()}
    config = json.loads(metadata["config"])
    save_file(under(tensors, "base."), folder / "base.safetensors")
    torch.save(adapter, folder / "pytorch_model.pt")
    table = {
        "model_config": {"in_dim": config["in_dim"], "num_heads": config["num_heads"]},
        "lora_rank": int(metadata["lora_rank"]),
        "lora_alpha": float(metadata["lora_alpha"]) if alpha is None else alpha,
    }
    (folder / "config.json").write_text(json.dumps(table))
    return folder / "base.safetensors", folder


def error(golden, base: Path, adapter: Path, dtype=torch.float32) -> float:
    tensors, _ = golden("adapter.safetensors")
    given = under(tensors, "input.")
    dit = load_dit(DiTFiles(base, adapter), attention=ATTENTION, dtype=dtype, device="cpu")
    with torch.inference_mode():
        output = dit(
            given["x"],
            given.get("y"),
            given["timestep"],
            dit.prepare_text(given["context"]),
            dit.prepare_audio(given["audio"]),
        )
    return relative_error(output, tensors["output"])


@pytest.mark.parametrize("default", [True, False])
def test_merged_model_gives_the_recorded_output(golden, tmp_path, default):
    assert error(golden, *write(golden, tmp_path, default=default)) <= 1e-4


def test_the_adapters_scale_changes_the_output(golden, tmp_path):
    recorded = float(golden("adapter.safetensors")[1]["lora_alpha"])
    for factor in (0.8, 1.25):
        assert error(golden, *write(golden, tmp_path, alpha=factor * recorded)) > 1e-3


def test_half_precision_is_close(golden, tmp_path):
    assert error(golden, *write(golden, tmp_path), dtype=torch.bfloat16) < 0.05


def test_sizes_are_read_from_the_files(golden, tmp_path):
    tensors, metadata = golden("adapter.safetensors")
    base, adapter = write(golden, tmp_path)
    assert inspect_dit(base, adapter) == dit_config(
        json.loads(metadata["config"]), under(tensors, "adapter.")
    )


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def test_layout_of_base_and_adapter(golden, tmp_path):
    tensors, metadata = golden("adapter.safetensors")
    base, adapter = write(golden, tmp_path)
    rank = int(metadata["lora_rank"])
    assert shapes(under(tensors, "base.")) == dict(dit_tensors(inspect_dit(base, num_heads=1)))
    assert shapes(under(tensors, "adapter.")) == dict(adapter_tensors(inspect_dit(base, adapter), rank))
    weights = under(golden("dit.safetensors")[0], "weights.")
    config = json.loads(golden("dit.safetensors")[1]["config"])
    assert shapes(weights) == dict(dit_tensors(dit_config(config, weights)))


def test_layout_of_the_vae(golden, tmp_path):
    tensors, metadata = golden("vae.safetensors")
    weights = under(tensors, "weights.")
    config = json.loads(metadata["config"])
    expected = VAEConfig(
        config["dim"], config["z_dim"], tuple(config["dim_mult"]), config["num_res_blocks"],
        tuple(config["temporal_downsample"]),
    )  # fmt: skip
    assert shapes(weights) == dict(vae_tensors(expected))
    torch.save(weights, tmp_path / "vae.pth")
    assert inspect_vae(tmp_path / "vae.pth") == expected


def test_layout_of_the_text_encoder(golden):
    tensors, metadata = golden("text.safetensors")
    config = json.loads(metadata["config"])
    spec = TextSpec(
        config["vocab"], config["dim"], config["dim_ffn"], config["num_heads"], config["num_layers"],
        config["dim_attn"], config["num_buckets"],
    )  # fmt: skip
    assert shapes(under(tensors, "weights.")) == dict(text_tensors(spec))


def test_layout_of_wav2vec(golden):
    """The recording has the library's names without the prefix, and the training-only mask embedding."""
    tensors, metadata = golden("wav2vec.safetensors")
    config = json.loads(metadata["config"])
    spec = Wav2VecSpec(
        config["hidden_size"], config["intermediate_size"], config["num_attention_heads"],
        config["num_hidden_layers"], config["conv_dim"][0], config["num_conv_pos_embeddings"],
        config["num_conv_pos_embedding_groups"],
    )  # fmt: skip
    ours = {library_key(key): shape for key, shape in wav2vec_tensors(spec)}
    theirs = {library_key(key): shape for key, shape in shapes(under(tensors, "weights.")).items()}
    ours.pop(None)
    theirs.pop(None)
    assert ours == theirs
