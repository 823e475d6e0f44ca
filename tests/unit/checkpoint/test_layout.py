"""The official layout, checked against digests, the released sizes, and the models that read it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch

from omniavatar.checkpoint.layout import (
    SCALES,
    adapter_tensors,
    dit_tensors,
    scale_spec,
    text_tensors,
    wav2vec_tensors,
)
from omniavatar.checkpoint.layout_files import checkpoint_layout
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.encoders.audio import library_key as wav2vec_key
from omniavatar.errors import ConfigError
from omniavatar.model.dit import WanDiT
from omniavatar.model.vae import WanVAE

# SHA-256 of all lines "file key shape dtype". Change one only if the released files differ, and say why.
DIGESTS = {
    "1.3B": "538765f4aab1c0c4735dcba7545f2c88865fba7d4eb0be90e7ad9458e2d47dc5",
    "14B": "fea095e64187aa132cd47cd95b260e329b4bf5e7c6ab663d306c24a77968e5b1",
}


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def count(tensors) -> int:
    return sum(math.prod(shape) for _, shape in tensors)


@pytest.mark.parametrize("scale", DIGESTS)
def test_digest_of_the_whole_list(scale):
    lines = [
        f"{layout.path} {entry.key} {entry.shape} {entry.dtype}"
        for layout in checkpoint_layout(scale_spec(scale))
        for entry in layout.tensors
    ]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGESTS[scale]


@pytest.mark.parametrize(
    ("scale", "base_tensors", "base_parameters", "adapter_tensors_count"),
    [("1.3B", 825, 1_418_996_800, 634), ("14B", 1095, 14_288_491_584, 844)],
)
def test_known_sizes_of_the_released_models(scale, base_tensors, base_parameters, adapter_tensors_count):
    spec = scale_spec(scale)
    base = list(dit_tensors(replace(spec.dit, in_dim=16, audio_dim=0)))
    assert len(base) == base_tensors and count(base) == base_parameters
    assert len(list(adapter_tensors(spec.dit, 128))) == adapter_tensors_count
    assert count(text_tensors(spec.text)) == 5_680_910_336
    assert count(vae_tensors(spec.vae)) == 126_892_531
    assert count(wav2vec_tensors(spec.wav2vec)) == 94_395_552
    assert spec.wav2vec.audio_dim == spec.dit.audio_dim == 10752
    assert len(spec.dit.audio_blocks) == {"1.3B": 14, "14B": 19}[scale]


def test_shards_of_the_14b():
    names = [layout.path for layout in checkpoint_layout(scale_spec("14B")) if "diffusion" in layout.path]
    assert names == [
        f"Wan2.1-T2V-14B/diffusion_pytorch_model-{number:05d}-of-00006.safetensors" for number in range(1, 7)
    ]
    assert "Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors" in [
        layout.path for layout in checkpoint_layout(scale_spec("1.3B"))
    ]


@pytest.mark.parametrize("spec", SCALES, ids=lambda spec: spec.name)
def test_models_have_the_layout_of_their_files(spec):
    with torch.device("meta"):
        dit, vae = WanDiT(spec.dit, torch.nn.functional.scaled_dot_product_attention), WanVAE(spec.vae)
    assert shapes_of(dit) == dict(dit_tensors(spec.dit))
    assert shapes_of(vae) == dict(vae_tensors(spec.vae))
    targets = {
        key.partition(".lora_")[0] + ".weight" for key, _ in adapter_tensors(spec.dit, 4) if "lora_" in key
    }
    assert targets <= set(shapes_of(dit))


@pytest.mark.parametrize("spec", SCALES, ids=lambda spec: spec.name)
def test_wav2vec_is_transformers_model_for_speech_recognition(spec, tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from omniavatar.checkpoint.synthetic import wav2vec_config

    with torch.device("meta"):
        model = Wav2Vec2Model(Wav2Vec2Config(**wav2vec_config(spec.wav2vec)))
    stored = {wav2vec_key(key): shape for key, shape in wav2vec_tensors(spec.wav2vec)}
    stored.pop(None)
    assert stored == {key: shape for key, shape in shapes_of(model).items() if key != "masked_spec_embed"}


@pytest.mark.parametrize("spec", SCALES, ids=lambda spec: spec.name)
def test_text_encoder_counts_as_transformers_umt5(spec):
    from transformers import UMT5Config, UMT5EncoderModel

    text = spec.text
    with torch.device("meta"):
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=text.vocab,
                d_model=text.dim,
                d_ff=text.dim_ffn,
                num_heads=text.num_heads,
                d_kv=text.dim_attn // text.num_heads,
                num_layers=text.num_layers,
                feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=text.num_buckets,
            )
        )
    ours = sorted(shape for _, shape in text_tensors(text))
    assert ours == sorted(tuple(value.shape) for value in model.parameters())


def test_unknown_scale():
    with pytest.raises(ConfigError, match=r"nano, 1\.3B, 14B"):
        scale_spec("7B")
