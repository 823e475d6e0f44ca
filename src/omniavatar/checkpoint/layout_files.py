"""Paths, formats and shards of the official weight files (see `layout`).

```
Wan2.1-T2V-{scale}/   diffusion_pytorch_model*.safetensors (+ index), models_t5_...pth, Wan2.1_VAE.pth,
                      config.json, google/umt5-xxl/ (tokenizer)
OmniAvatar-{scale}/   pytorch_model.pt, config.json
wav2vec2-base-960h/   model.safetensors, config.json, preprocessor_config.json
```
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from omniavatar.checkpoint.layout import (
    LATENT_CHANNELS,
    SHARD_BYTES,
    FileLayout,
    ScaleSpec,
    Shape,
    TensorEntry,
    adapter_tensors,
    dit_tensors,
    text_tensors,
    wav2vec_tensors,
)
from omniavatar.checkpoint.layout_vae import vae_tensors

DIT_STEM = "diffusion_pytorch_model"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"
TOKENIZER = "google/umt5-xxl"
WAV2VEC = "wav2vec2-base-960h"


def base_folder(spec: ScaleSpec) -> str:
    """Folder of the base model, below the root."""
    return f"Wan2.1-T2V-{spec.name}"


def adapter_folder(spec: ScaleSpec) -> str:
    """Folder of OmniAvatar's adapter, below the root."""
    return f"OmniAvatar-{spec.name}"


def checkpoint_layout(spec: ScaleSpec) -> tuple[FileLayout, ...]:
    """Every weight file of a checkpoint; the tensors of a file are sorted by name, as in the release."""
    base = base_folder(spec)
    base_config = replace(spec.dit, in_dim=LATENT_CHANNELS, audio_dim=0)
    return (
        *_shards(base, _entries(dit_tensors(base_config), torch.float32)),
        FileLayout(f"{base}/{TEXT_ENCODER}", "torch", _entries(text_tensors(spec.text), torch.bfloat16)),
        FileLayout(f"{base}/{VAE}", "torch", _entries(vae_tensors(spec.vae), torch.float32)),
        FileLayout(
            f"{adapter_folder(spec)}/pytorch_model.pt",
            "torch",
            _entries(adapter_tensors(spec.dit, spec.lora_rank), torch.float32),
        ),
        FileLayout(
            f"{WAV2VEC}/model.safetensors",
            "safetensors",
            _by_name(_entries(wav2vec_tensors(spec.wav2vec), torch.float32)),
        ),
    )


def _entries(tensors: Iterable[tuple[str, Shape]], dtype: torch.dtype) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(key, shape, dtype) for key, shape in tensors)


def _by_name(entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.key))


def _shards(folder: str, entries: tuple[TensorEntry, ...]) -> tuple[FileLayout, ...]:
    """Shards of at most 10 GB, filled in the order of the layers, as Hugging Face's tools do."""
    shards: list[list[TensorEntry]] = [[]]
    held = 0
    for entry in entries:
        if held + entry.num_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.num_bytes
    names = [f"{DIT_STEM}-{number:05d}-of-{len(shards):05d}" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [DIT_STEM]
    return tuple(
        FileLayout(f"{folder}/{name}.safetensors", "safetensors", _by_name(shard))
        for name, shard in zip(names, shards, strict=True)
    )
