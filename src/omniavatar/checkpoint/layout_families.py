"""Paths and weight files of the released FlashHead and LeapTalk (see `layout_files`).

```
SoulX-FlashHead-1_3B/   Model_Pro/{diffusion_pytorch_model.safetensors, config.json}, VAE_Wan/Wan2.1_VAE.pth
LeapTalk/               lora/{adapter_model.safetensors, adapter_config.json}, audio_proj_step_10400.pt,
                        taew2_1.pth
wav2vec2-base-960h/     as for OmniAvatar
```
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from omniavatar.checkpoint.layout import (
    FLASHHEAD,
    FileLayout,
    ScaleSpec,
    Shape,
    TensorEntry,
    dit_tensors,
    flashhead_tensors,
    leaptalk_lora_tensors,
)
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.tiny_decoder import (
    tiny_decoder_config,
    tiny_decoder_tensors,
    tiny_encoder_tensors,
)

LEAPTALK = "LeapTalk"
SPEECH = "wav2vec2-base-960h"
PRO_DIT = f"{FLASHHEAD}/Model_Pro/diffusion_pytorch_model.safetensors"
PRO_CONFIG = f"{FLASHHEAD}/Model_Pro/config.json"
PRO_VAE = f"{FLASHHEAD}/VAE_Wan/Wan2.1_VAE.pth"
LORA = f"{LEAPTALK}/lora/adapter_model.safetensors"
LORA_CONFIG = f"{LEAPTALK}/lora/adapter_config.json"
PROJECTOR = f"{LEAPTALK}/audio_proj_step_10400.pt"
TINY = f"{LEAPTALK}/taew2_1.pth"


_SHARED_PATHS: Mapping[str, Any] = {"dit_path": PRO_DIT, "wav2vec_path": SPEECH}
CONFIG_PATHS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "flashhead": {**_SHARED_PATHS, "vae_path": PRO_VAE},
        "leaptalk": {
            **_SHARED_PATHS,
            "loras": [{"path": LORA, "strength": 1.0}],
            "audio_proj_path": PROJECTOR,
            "decoder_path": TINY,
        },
    }
)
"""Settings of a family that name files, below the root."""
NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flashhead": (PRO_DIT, PRO_CONFIG, PRO_VAE),
        "leaptalk": (PRO_DIT, PRO_CONFIG, LORA, LORA_CONFIG, PROJECTOR, TINY),
    }
)
"""Files that a family's configuration reads, without those of wav2vec 2.0."""
OWN: Mapping[str, str] = MappingProxyType({"flashhead": FLASHHEAD, "leaptalk": LEAPTALK})
"""The folder that only this family and those built on it have."""
BUILT_ON: Mapping[str, str] = MappingProxyType({"leaptalk": "flashhead"})
"""A family whose files include those of another one."""


def family_layout(spec: ScaleSpec) -> tuple[FileLayout, ...]:
    """The weight files of a FlashHead or a LeapTalk, without those of wav2vec 2.0."""
    dit = _entries(flashhead_tensors(spec.dit, spec.wav2vec.hidden), torch.float32)
    files = [
        FileLayout(PRO_DIT, "safetensors", tuple(sorted(dit, key=lambda entry: entry.key))),
        FileLayout(PRO_VAE, "torch", _entries(vae_tensors(spec.vae), torch.float32)),
    ]
    if spec.family == "leaptalk":
        lora = _entries(leaptalk_lora_tensors(spec.dit, spec.lora_rank), torch.float32)
        files += [
            FileLayout(LORA, "safetensors", tuple(sorted(lora, key=lambda entry: entry.key))),
            FileLayout(PROJECTOR, "torch", _entries(_projector(spec), torch.bfloat16)),
            FileLayout(TINY, "torch", _entries(_tiny(spec), torch.float16)),
        ]
    return tuple(files)


def side_files(spec: ScaleSpec) -> dict[str, dict[str, Any]]:
    """Content of the JSON files beside the weights, by path."""
    dit = spec.dit
    files: dict[str, dict[str, Any]] = {
        PRO_CONFIG: {
            "dim": dit.dim,
            "in_dim": dit.in_dim,
            "ffn_dim": dit.ffn_dim,
            "out_dim": dit.out_dim,
            "text_dim": dit.text_dim,
            "freq_dim": dit.freq_dim,
            "eps": dit.eps,
            "num_heads": dit.num_heads,
            "num_layers": dit.num_layers,
            "patch_size": list(dit.patch_size),
            "vae_stride": [4, 8, 8],
            "has_image_input": False,
        }
    }
    if spec.family == "leaptalk":
        files[LORA_CONFIG] = {
            "peft_type": "LORA",
            "r": spec.lora_rank,
            "lora_alpha": spec.lora_alpha,
            "target_modules": ["q", "k", "v", "o"],
        }
    return files


def _projector(spec: ScaleSpec) -> Iterator[tuple[str, Shape]]:
    """The audio projector's weights, without its name in front."""
    prefix = "audio_proj."
    for key, shape in dit_tensors(spec.dit):
        if key.startswith(prefix):
            yield key.removeprefix(prefix), shape


def _tiny(spec: ScaleSpec) -> Iterator[tuple[str, Shape]]:
    config = tiny_decoder_config(spec.vae)
    yield from tiny_decoder_tensors(config)
    yield from tiny_encoder_tensors(config.widths[-1], config.z_dim)


def _entries(tensors: Iterable[tuple[str, Shape]], dtype: torch.dtype) -> tuple[TensorEntry, ...]:
    return tuple(TensorEntry(key, shape, dtype) for key, shape in tensors)
