"""Copies of a configuration with changed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.errors import ConfigError
from omniavatar.types import SamplingParams


def changed(config: PipelineConfig, **sections: Mapping[str, Any]) -> PipelineConfig:
    """A copy of `config` with changed fields.

    sections: field values by section name, such as `runtime={"device": "cpu"}`.
    """
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def effective_sampling(configured: SamplingConfig, params: SamplingParams) -> SamplingConfig:
    """`configured` with the values that the request sets, validated again. Raises ConfigError."""
    changes = {name: value for name, value in vars(params).items() if value is not None}
    if not changes:
        return configured
    values = {**configured.model_dump(), **changes}
    try:
        sampling = SamplingConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "sampling"
        raise ConfigError(f"request: {name}: {first['msg'].removeprefix('Value error, ')}") from None
    if sampling.causal != configured.causal:
        raise ConfigError(
            f"request: sampler: {sampling.sampler} needs other weights than {configured.sampler} of the "
            "configuration; leave it out, or use another configuration"
        )
    return sampling
