"""How much memory a run will take, estimated before anything heavy.

Weights are exact: parameters of the DiT and the VAE counted on the meta device times the size of the
configured dtype, and file sizes for the encoders. Activations are a rough upper bound from the largest
tensors alive at once in one block and in the VAE's last stage; expect them to be off by a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omniavatar.checkpoint.layout import scale_spec, vae_config
from omniavatar.config import PipelineConfig
from omniavatar.plan import RunPlan
from omniavatar.weights_preview import assumed_scale, find_dit_config

if TYPE_CHECKING:
    from omniavatar.model.dit import DiTConfig

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TEXT_ENCODER_BYTES = {"nano": 0, "1.3B": 11_361_845_248, "14B": 11_361_845_248}
_WAV2VEC_BYTES = {"nano": 0, "1.3B": 377_611_120, "14B": 377_611_120}
_TEXT_TOKENS = 512
_FLOAT = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part. Everything but `text_encoder` and `audio_features_file` is on the device all the time;
    the text encoder comes and goes before the first window, the features lie on disk."""

    dit: int
    vae: int
    audio_encoder: int
    text_encoder: int
    activations: int
    audio_features_file: int
    assumed_scale: str | None

    @property
    def device_peak(self) -> int:
        """Weights that stay and the larger of activations and text encoder."""
        return self.dit + self.vae + self.audio_encoder + max(self.activations, self.text_encoder)


def estimate_memory(config: PipelineConfig, plan: RunPlan) -> MemoryEstimate:
    """Memory of one request under `plan`. Raises CheckpointError for files that are there but broken."""
    import torch

    from omniavatar.model.dit import WanDiT
    from omniavatar.model.vae import WanVAE

    model = config.model
    dit, assumed = find_dit_config(model)
    scale = assumed_scale(model)
    size = _BYTES[model.dtype]
    with torch.device("meta"):
        dit_count = _count(WanDiT(dit, torch.nn.functional.scaled_dot_product_attention))
        vae_count = _count(WanVAE(vae_config(scale_spec(scale))))
    return MemoryEstimate(
        dit=dit_count * size,
        vae=vae_count * size,
        audio_encoder=_size_on_disk(model.wav2vec_path) or _WAV2VEC_BYTES[scale],
        text_encoder=_size_on_disk(model.text_encoder_path) or _TEXT_ENCODER_BYTES[scale],
        activations=max(_dit_activations(dit, plan, size), _vae_activations(plan, size)),
        audio_features_file=plan.padded_audio_frames * dit.audio_dim * _FLOAT,
        assumed_scale=assumed,
    )


def _count(module: object) -> int:
    import torch

    assert isinstance(module, torch.nn.Module)
    return sum(parameter.numel() for parameter in module.parameters())


def _dit_activations(dit: DiTConfig, plan: RunPlan, size: int) -> int:
    """Largest of feed-forward and attention of one block, plus what lives through the whole window."""
    feed_forward = plan.tokens * (2 * dit.ffn_dim * size + 3 * dit.dim * size + dit.dim * _FLOAT)
    attention = plan.tokens * dit.dim * (6 * size + 2 * _FLOAT)
    text = 2 * dit.num_layers * 2 * _TEXT_TOKENS * dit.dim * size
    caching = plan.step_plan is None or plan.step_plan.policy != "none"
    residuals = len(plan.branches) * plan.tokens * dit.dim * size if caching else 0
    return max(feed_forward, attention) + text + residuals


def _vae_activations(plan: RunPlan, size: int) -> int:
    """The VAE's last stage at full resolution: 4 frames of 96 channels in and out, and its causal caches."""
    height, width = plan.size
    return height * width * 96 * 28 * size


def _size_on_disk(path: Path | None) -> int:
    """Bytes of a weight file, or of the weight file in a folder; 0 when it is not there."""
    if path is None or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return (path / name).stat().st_size
    return 0
