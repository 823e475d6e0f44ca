"""Copies of a configuration with changed values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from omniavatar.config.families import Family
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.config.values import FieldError
from omniavatar.errors import ConfigError
from omniavatar.types import SamplingParams


def changed(config: PipelineConfig, **sections: Mapping[str, Any]) -> PipelineConfig:
    """A copy of `config` with changed fields.

    sections: field values by section name, such as `runtime={"device": "cpu"}`.
    """
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=update)


def with_family(config: PipelineConfig, name: str) -> PipelineConfig:
    """`config` with the family `name`, checked again; unset settings become those of the family.

    Raises ConfigError.
    """
    before = config.model.family
    if name == before:
        return config
    if name == "omniavatar":
        error = family_error(changed(config, model={"family": name}))
        if error is not None:
            raise ConfigError(error)
        return config
    values = config.model_dump(exclude_unset=True)
    values["model"] = {**values.get("model", {}), "family": name}
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first(error)) from None


def family_error(config: PipelineConfig) -> str | None:
    """What the configured family cannot follow, as one line; None if it follows all."""
    from omniavatar.config.family_checks import check_family

    try:
        check_family(config.family, vars(config))
    except FieldError as error:
        return f"{error.fields[0].rpartition('.')[2]}: {error}"
    return None


def _first(error: ValidationError) -> str:
    """The first problem as one line."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    name = cause.fields[0] if isinstance(cause, FieldError) else ".".join(map(str, first["loc"]))
    return f"{name.rpartition('.')[2]}: {first['msg'].removeprefix('Value error, ')}"


def effective_sampling(
    configured: SamplingConfig, params: SamplingParams, family: Family | None = None
) -> SamplingConfig:
    """`configured` with the values that the request sets, validated again. Raises ConfigError.

    family: also checks that it can follow them; None for a family that is not known yet.
    """
    changes = {name: value for name, value in vars(params).items() if value is not None}
    if not changes:
        return configured
    values = {**configured.model_dump(), **changes}
    if family is not None:
        from omniavatar.config.family_checks import as_given, check_family_sampling

        try:
            given = {name: getattr(as_given(SamplingConfig, changes), name) for name in changes}
            check_family_sampling(family, {**vars(configured), **given})
        except FieldError as error:
            raise ConfigError(f"request: {error.fields[0].rpartition('.')[2]}: {error}") from None
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
