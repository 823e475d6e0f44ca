"""Paths, formats and shards of the official weight files (see `layout`).

```
Wan2.1-T2V-{scale}/   diffusion_pytorch_model*.safetensors (+ index), models_t5_...pth, Wan2.1_VAE.pth,
                      config.json, google/umt5-xxl/ (tokenizer)
OmniAvatar-{scale}/   pytorch_model.pt, config.json
LiveTalk-{name}/      model.safetensors: a merged DiT, instead of the base's and the adapter
wav2vec2-base-960h/   model.safetensors, config.json, preprocessor_config.json
```
Those of FlashHead and LeapTalk are in `layout_families`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from omniavatar.checkpoint.layout import (
    LATENT_CHANNELS,
    SHARD_BYTES,
    TOKEN_FAMILIES,
    FileLayout,
    ScaleSpec,
    Shape,
    TensorEntry,
    adapter_tensors,
    dit_tensors,
    text_tensors,
    wav2vec_tensors,
)
from omniavatar.checkpoint.layout_families import SPEECH, family_layout
from omniavatar.checkpoint.layout_vae import vae_tensors

DIT_STEM = "diffusion_pytorch_model"
MERGED_DIT = "model.safetensors"
ADAPTER = "pytorch_model.pt"
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"
TOKENIZER = "google/umt5-xxl"
WAV2VEC = SPEECH


def base_folder(spec: ScaleSpec) -> str:
    """Folder of the base model, below the root."""
    return f"Wan2.1-T2V-{spec.name}"


def adapter_folder(spec: ScaleSpec) -> str:
    """Folder of OmniAvatar's adapter, below the root."""
    return f"OmniAvatar-{spec.name}"


def checkpoint_layout(spec: ScaleSpec, shard_bytes: int = SHARD_BYTES) -> tuple[FileLayout, ...]:
    """Every weight file of a checkpoint; the tensors of a file are sorted by name, as in the release."""
    base = base_folder(spec)
    speech = FileLayout(
        f"{WAV2VEC}/model.safetensors",
        "safetensors",
        _by_name(_entries(wav2vec_tensors(spec.wav2vec), torch.float32)),
    )
    if spec.family in TOKEN_FAMILIES:
        return (*family_layout(spec), speech)
    return (
        *_dit_files(spec, shard_bytes),
        FileLayout(f"{base}/{TEXT_ENCODER}", "torch", _entries(text_tensors(spec.text), torch.bfloat16)),
        FileLayout(f"{base}/{VAE}", "torch", _entries(vae_tensors(spec.vae), torch.float32)),
        *_adapter_files(spec),
        speech,
    )


def dit_paths(spec: ScaleSpec) -> list[str]:
    """Paths of the DiT's files, the base's without the adapter."""
    return [layout.path for layout in _dit_files(spec, SHARD_BYTES)]


def _dit_files(spec: ScaleSpec, shard_bytes: int) -> tuple[FileLayout, ...]:
    if spec.merged:
        tensors = _by_name(_entries(dit_tensors(spec.dit), torch.float32))
        return (FileLayout(f"{spec.merged}/{MERGED_DIT}", "safetensors", tensors),)
    base_config = replace(spec.dit, in_dim=LATENT_CHANNELS, audio_dim=0)
    return _shards(base_folder(spec), _entries(dit_tensors(base_config), torch.float32), shard_bytes)


def _adapter_files(spec: ScaleSpec) -> tuple[FileLayout, ...]:
    if spec.merged:
        return ()
    tensors = _entries(adapter_tensors(spec.dit, spec.lora_rank), torch.float32)
    return (FileLayout(f"{adapter_folder(spec)}/{ADAPTER}", "torch", tensors),)


def _entries(tensors: Iterable[tuple[str, Shape]], dtype: torch.dtype) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(key, shape, dtype) for key, shape in tensors)


def _by_name(entries: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.key))


def _shards(folder: str, entries: tuple[TensorEntry, ...], shard_bytes: int) -> tuple[FileLayout, ...]:
    """Shards of at most `shard_bytes`, filled in the order of the layers, as Hugging Face's tools do."""
    shards: list[list[TensorEntry]] = [[]]
    held = 0
    for entry in entries:
        if held + entry.num_bytes > shard_bytes and shards[-1]:
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
