"""A configuration as flat values, and which of them decide the video."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omniavatar.config.schema import PipelineConfig

NEUTRAL_FIELDS = frozenset(
    {
        "model.input_limits",
        "output.output_dir",
        "output.naming",
        "output.resume",
        "output.keep_job",
        "runtime.device",
        "runtime.memory",
        "runtime.num_persistent_param_in_dit",
        "runtime.text_cache_dir",
        "runtime.threads",
        "runtime.sp_size",
        "runtime.cfg_parallel",
        "runtime.use_fsdp",
        "runtime.vae_parallel",
        "runtime.exchange",
        "runtime.cuda_graphs",
    }
)
"""Fields that change the video not at all or by rounding (number of GPUs); a resumed run may have others."""


def flat_values(config: PipelineConfig) -> dict[str, Any]:
    """JSON-able values of every leaf by its dotted name (`sampling.num_steps`)."""
    return {
        f"{section}.{name}": value
        for section, values in config.model_dump(mode="json").items()
        for name, value in values.items()
    }


def result_values(config: PipelineConfig) -> dict[str, Any]:
    """`flat_values` without the fields that do not change the video (`NEUTRAL_FIELDS`)."""
    return {name: value for name, value in flat_values(config).items() if name not in NEUTRAL_FIELDS}


def config_hash(config: PipelineConfig) -> str:
    """SHA-256 (hex) of `result_values`: equal for configs that make the same video from the same files."""
    text = json.dumps(result_values(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
