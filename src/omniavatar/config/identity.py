"""A configuration as flat values, and the values that change the video."""

from __future__ import annotations

import hashlib
import json
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


def flat_values(config: PipelineConfig) -> dict[str, Any]:
    """The value of every leaf, as JSON types, by dotted name (`sampling.num_steps`)."""
    return {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in values.items()
    }


def result_values(config: PipelineConfig) -> dict[str, Any]:
    """`flat_values` without the fields that do not change the video.

    These are `NEUTRAL_FIELDS`, and those that the sampler does not read (`config.values`).
    """
    if config.sampling.causal is None:
        unread = {f"sampling.{name}" for name in CAUSAL_FIELDS}
    else:
        unread = {f"video.{name}" for name in WINDOW_FIELDS}
    if config.sparsity.sparse_attention == "dense":
        unread |= {f"sparsity.{name}" for name in type(config.sparsity).model_fields}
    return {name: value for name, value in flat_values(config).items() if name not in NEUTRAL_FIELDS | unread}


def config_hash(config: PipelineConfig) -> str:
    """SHA-256 (hex) of `result_values`; equal for configurations that make the same video."""
    text = json.dumps(result_values(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
