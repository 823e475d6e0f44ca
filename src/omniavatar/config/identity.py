"""A configuration as flat values, and the values that change the video."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from omniavatar.config.schema import PipelineConfig
from omniavatar.config.values import CAUSAL_FIELDS, WINDOW_FIELDS

NEUTRAL_FIELDS = frozenset(
    {
        "model.input_limits",
        "output.output_dir",
        "output.naming",
        "output.resume",
        "output.keep_job",
        "output.provenance",
        "output.provenance_certificate",
        "output.provenance_key",
        "output.provenance_algorithm",
        "output.provenance_timestamp",
        "output.provenance_inputs",
        "runtime.device",
        "runtime.memory",
        "runtime.num_persistent_param_in_dit",
        "runtime.text_cache_dir",
        "runtime.threads",
        "runtime.sp_size",
        "runtime.cfg_parallel",
        "runtime.use_fsdp",
        "runtime.vae_parallel",
        "runtime.vae_device",
        "runtime.exchange",
        "runtime.cuda_graphs",
    }
)
"""Fields that change the video only by rounding (number of GPUs) or not at all; a resumed run may change
them. On a CPU the number of threads in use counts nevertheless (`engine.identity`)."""

SWITCHED_OFF: Mapping[str, Any] = MappingProxyType(
    {
        "model.family": "omniavatar",
        "model.latent_encoder": "full",
        "model.audio_proj_path": None,
        "sampling.hand_over": "pixels",
        "sampling.noise_span": 1,
        "sampling.noise_white": 0,
        "video.color_match": 0.0,
        "video.anchor_every": 0,
        "video.blend_frames": 0,
        "video.hold_background": 0.0,
        "video.face_crop": False,
        "output.key_frame_s": 0.0,
    }
)
"""Fields that change nothing with this value, and that older versions lacked: a run that an older version
began has the same identity without them."""


def flat_values(config: PipelineConfig) -> dict[str, Any]:
    """The value of every leaf, as JSON types, by dotted name (`sampling.num_steps`)."""
    return {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in values.items()
    }


def result_values(config: PipelineConfig) -> dict[str, Any]:
    """`flat_values` without the fields that do not change the video.

    These are `NEUTRAL_FIELDS`, those that the sampler and the family do not read, and those of other families
    that are switched off.
    """
    family = config.family
    window = {f"video.{name}" for name in WINDOW_FIELDS}
    unread = window if family.chunk is not None else set()
    if config.sampling.causal is None:
        unread |= {f"sampling.{name}" for name in CAUSAL_FIELDS}
    else:
        unread |= window
    if not family.text:
        unread |= {"sampling.negative_prompt", "model.text_encoder_path", "model.tokenizer_path"}
    if config.sparsity.sparse_attention == "dense":
        unread |= {f"sparsity.{name}" for name in type(config.sparsity).model_fields}
    values = {**flat_values(config), "model.family": family.name}
    unread |= NEUTRAL_FIELDS | {name for name, off in SWITCHED_OFF.items() if values[name] == off}
    return {name: value for name, value in values.items() if name not in unread}


def config_hash(config: PipelineConfig) -> str:
    """SHA-256 (hex) of `result_values`; equal for configurations that make the same video."""
    text = json.dumps(result_values(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
