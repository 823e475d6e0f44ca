"""Image, text and audio preparation equal the recordings of the original code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative_error, under
from safetensors.torch import save_file

from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.image import choose_bucket, prepare_image
from omniavatar.encoders.text import TextEncoder
from tiny_tokenizer import write_tokenizer

SIZES = {
    "720": [(400, 720), (720, 720), (720, 400)],
    "1280": [(720, 720), (528, 960), (960, 528), (720, 1280), (1280, 720)],
}


def test_size_buckets(golden) -> None:
    for name, chosen in json.loads(golden.path("image_sizes.json").read_text()).items():
        height, width = map(int, name.split("x"))
        for max_hw, bucket in chosen.items():
            assert choose_bucket(height, width, SIZES[max_hw]) == tuple(bucket), (name, max_hw)


def test_image_preparation(golden) -> None:
    tensors, _ = golden("image_prep.safetensors")
    names = sorted(key.removesuffix(".input") for key in tensors if key.endswith(".input"))
    assert names
    for name in names:
        expected = tensors[f"{name}.output"]
        image = np.asarray(tensors[f"{name}.input"])
        assert relative_error(prepare_image(image, tuple(expected.shape[-2:])), expected) <= 1e-4


def test_text_embeddings(golden, tmp_path: Path) -> None:
    tensors, _ = golden("text.safetensors")
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(under(tensors, "weights."), path)
    encoder = TextEncoder.load(path, write_tokenizer(tmp_path / "tokenizer"), "cpu", torch.float32)
    embedding = encoder.encode_tokens(tensors["ids"], tensors["mask"])
    assert relative_error(embedding, tensors["embedding"]) <= 1e-4
    assert not embedding[tensors["mask"] == 0].any()


@pytest.mark.parametrize(("span_seconds", "kv_bytes"), [(30.0, None), (0.37, 1)])
def test_audio_features(golden, tmp_path: Path, span_seconds: float, kv_bytes: int | None) -> None:
    tensors, metadata = golden("wav2vec.safetensors")
    (tmp_path / "config.json").write_text(metadata["config"])
    released = {
        "wav2vec2."
        + key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in under(tensors, "weights.").items()
    }
    save_file(released | {"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    encoder = AudioEncoder.load(tmp_path, "cpu")
    recorded = [key for key in tensors if key.startswith("embedding_")]
    assert recorded
    for key in recorded:
        features = encoder.encode(
            tensors["audio"].numpy(),
            int(key.removeprefix("embedding_")),
            25,
            tmp_path / f"{key}.npy",
            span_seconds=span_seconds,
            kv_bytes=kv_bytes,
        )
        assert relative_error(torch.from_numpy(np.array(features)), tensors[key]) <= 1e-4
