"""How much memory a run will take, estimated before anything heavy.

Weights are exact: the official layout's shapes in the configured dtype. Activations are a rough upper bound
from the largest tensors alive at once in one block and in the VAE's last stage; expect them to be off by a
third. The text encoder is counted apart, since it comes and goes before the first window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omniavatar.checkpoint.dit import keep_float32
from omniavatar.checkpoint.layout import Shape, dit_tensors, scale_spec, text_tensors, wav2vec_tensors
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.tiny_decoder import light_vae_config, tiny_decoder_config, tiny_decoder_tensors
from omniavatar.config import PipelineConfig
from omniavatar.plan import RunPlan
from omniavatar.weights_preview import assumed_scale, find_dit_config

if TYPE_CHECKING:
    from omniavatar.model.dit import DiTConfig
    from omniavatar.model.vae import VAEConfig

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TEXT_TOKENS = 512
_FLOAT = 4
_VAE_FRAMES = {"plain": 28, "fast": 52, "auto": 52}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part; `audio_features_file` lies on disk. `assumed_scale`: the model counted, if not read off
    the files."""

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


def estimate_memory(config: PipelineConfig, plan: RunPlan, has_audio: bool) -> MemoryEstimate:
    """Memory of one request under `plan`. Raises CheckpointError for files that are there but broken."""
    model = config.model
    dit, assumed = find_dit_config(model)
    spec = scale_spec(assumed_scale(model))
    size = _BYTES[model.dtype]
    return MemoryEstimate(
        dit=sum(
            math.prod(shape) * (_FLOAT if keep_float32(key) else size) for key, shape in dit_tensors(dit)
        ),
        vae=(_count(vae_tensors(spec.vae)) + _decoder_weights(model.decoder, spec.vae)) * size,
        audio_encoder=_count(wav2vec_tensors(spec.wav2vec)) * _FLOAT,
        text_encoder=_count(text_tensors(spec.text)) * size,
        activations=max(
            _dit_activations(dit, plan, size),
            _vae_activations(spec.vae.dim, plan, size, _VAE_FRAMES[config.runtime.vae]),
        ),
        audio_features_file=plan.padded_audio_frames * dit.audio_dim * _FLOAT if has_audio else 0,
        assumed_scale=assumed,
    )


def _count(tensors: Iterable[tuple[str, Shape]]) -> int:
    return sum(math.prod(shape) for _, shape in tensors)


def _decoder_weights(decoder: str, vae: VAEConfig) -> int:
    """Weights of a smaller decoder beside the full VAE, which stays for encoding."""
    if decoder == "full":
        return 0
    if decoder == "lightvae":
        return _count(vae_tensors(light_vae_config(vae)))
    return _count(tiny_decoder_tensors(tiny_decoder_config(vae)))


def _dit_activations(dit: DiTConfig, plan: RunPlan, size: int) -> int:
    """Largest of feed-forward and attention of one block, plus what lives through the whole window."""
    feed_forward = plan.tokens * (2 * dit.ffn_dim * size + 3 * dit.dim * size + dit.dim * _FLOAT)
    attention = plan.tokens * dit.dim * (6 * size + 2 * _FLOAT)
    text = 2 * dit.num_layers * 2 * _TEXT_TOKENS * dit.dim * size
    caching = plan.step_plan is None or plan.step_plan.policy != "none"
    residuals = len(plan.branch_patterns) * plan.tokens * dit.dim * size if caching else 0
    return max(feed_forward, attention) + text + residuals


def _vae_activations(channels: int, plan: RunPlan, size: int, frames: int) -> int:
    """The VAE's last stage at full resolution: frames in, inside and out, and its causal caches."""
    height, width = plan.size
    return height * width * channels * frames * size
