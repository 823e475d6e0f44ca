"""Encoders on CUDA: features equal to the CPU's (no TF32), and finite embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from omniavatar.encoders.audio import AudioEncoder
from omniavatar.encoders.text import random_text_encoder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kv_bytes", [None, 2**20])
def test_audio_features_equal_the_cpu(tmp_path: Path, kv_bytes: int | None) -> None:
    waveform = (np.random.default_rng(0).standard_normal(16000 * 40) * 0.1).astype(np.float32)
    results = []
    for device in ("cpu", "cuda"):
        encoder = AudioEncoder.random(hidden=128, layers=3, heads=2, conv_dim=64, device=device, seed=0)
        out = tmp_path / f"{device}.npy"
        results.append(np.array(encoder.encode(waveform, 1000, 25, out, span_seconds=7, kv_bytes=kv_bytes)))
    cpu, cuda = results
    assert np.abs(cuda - cpu).max() <= 1e-4 * np.abs(cpu).max()


def test_random_text_encoder_is_made_on_the_device() -> None:
    sizes = {
        "vocab_size": 300, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 4, "num_heads": 4,
        "relative_attention_num_buckets": 32,
    }  # fmt: skip
    encoder = random_text_encoder("cuda", torch.bfloat16, seed=0, sizes=sizes)
    embeddings = encoder.encode(["a woman speaks", "another prompt"])
    assert embeddings.shape == (2, 512, 256) and embeddings.is_cuda
    assert torch.isfinite(embeddings).all() and not embeddings[0, 100:].any()
