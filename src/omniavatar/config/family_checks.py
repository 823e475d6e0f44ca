"""What a model family cannot follow, and what is refused before anything else.

The functions take the values of a section by field, and raise FieldError.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from omniavatar.config.backends import alternatives, registry
from omniavatar.config.combinations import check_causal
from omniavatar.config.families import FAMILIES, Family, family_of
from omniavatar.config.values import CAUSAL_FIELDS, FieldError


def check_refused_first(values: Any, kinds: Mapping[str, type[BaseModel]]) -> None:
    """Check what the family or `sampler: causal` cannot follow, in settings that have other faults too.

    The remedy of such a fault may be a setting that is refused next.

    - values: settings by section, as they were given.
    - kinds: the class of each section.
    """
    given = with_family_settings(values)
    if not isinstance(given, Mapping):
        return
    sections = {name: as_given(kind, given.get(name)) for name, kind in kinds.items()}
    sampling, family = vars(sections["sampling"]), vars(sections["model"])["family"]
    if family in FAMILIES.names:
        check_family(family_of(family), sections)
    samplers = registry("sampling.sampler")
    if sampling["sampler"] in samplers.names and samplers.get(sampling["sampler"]).causal:
        video, runtime = sections["video"], vars(sections["runtime"])
        sparse = vars(sections["sparsity"])["sparse_attention"]
        check_causal(video.model_fields_set, vars(video), sampling["hand_over"], runtime, sparse)


def as_given(kind: type[BaseModel], values: Any) -> BaseModel:
    """A section with the given values, each checked alone; one with a fault is kept as it is."""
    found: dict[str, Any] = {}
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if name in kind.model_fields:
            try:
                found[name] = _checker(kind, name).validate_python(value)
            except ValidationError:
                found[name] = value
    return kind.model_construct(**found)


@functools.cache
def _checker(kind: type[BaseModel], name: str) -> TypeAdapter[Any]:
    field = kind.model_fields[name]
    checked: Any = Annotated[field.annotation, field]
    return TypeAdapter(checked)


def with_family_settings(values: Any) -> Any:
    """Settings by section, with those of the configured family where none are given.

    A section that is no mapping is left as it is.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("model"), Mapping):
        return values
    name = values["model"].get("family")
    if name not in FAMILIES.names:
        return values
    merged = dict(values)
    for section, own in family_of(name).create().items():
        given = merged.get(section, {})
        if isinstance(given, Mapping):
            merged[section] = {**own, **given}
    return merged


def check_family(family: Family, sections: Mapping[str, BaseModel]) -> None:
    """Check what the family cannot follow. Raises FieldError."""
    check_family_sampling(family, vars(sections["sampling"]))
    for leaf in CAUSAL_FIELDS if family.samplers else ():
        if _is_changed(sections["sampling"], leaf):
            followed = alternatives(family.samplers)
            raise FieldError(
                f"{family.name}: its weights follow {followed}, which reads no {leaf}; leave it out",
                f"sampling.{leaf}",
                "model.family",
            )
    if family.chunk is not None and vars(sections["video"])["fps"] != family.chunk.fps:
        raise FieldError(f"{family.name}: {family.refused['video.fps']}", "video.fps", "model.family")
    for setting, reason in family.refused.items():
        name, _, only = setting.partition("=")
        section, _, leaf = name.partition(".")
        if section == "sampling" or name == "video.fps":
            continue
        values = sections[section]
        if only:
            refused = getattr(values, leaf) == only
        else:
            refused = leaf in values.model_fields_set if section == "video" else _is_changed(values, leaf)
        if refused:
            raise FieldError(f"{family.name}: {reason}", name, "model.family")


def _is_changed(section: BaseModel, leaf: str) -> bool:
    """Whether the field was given, with another value than its default."""
    default = type(section).model_fields[leaf].default
    return leaf in section.model_fields_set and getattr(section, leaf) != default


def check_family_sampling(family: Family, sampling: Mapping[str, Any]) -> None:
    """Check the sampling settings of a configuration or a request, by field. Raises FieldError."""
    name = family.name
    samplers = registry("sampling.sampler")
    fitting = family.samplers or tuple(each.name for each in samplers if not each.from_portrait)
    if sampling["sampler"] not in fitting:
        text = f"{name}: its weights follow {alternatives(fitting)}; set sampler to that"
        raise FieldError(text, "sampling.sampler", "model.family")
    if sampling["hand_over"] not in family.hand_overs:
        raise FieldError(
            f"{name}: hands over {alternatives(family.hand_overs)}, because the VAE codes the first frame of "
            "a clip alone, which a latent from the middle of a clip is not; set hand_over to one of these",
            "sampling.hand_over",
            "model.family",
        )
    off: Mapping[str, tuple[Any, ...]] = {
        "guidance_scale": (1.0,),
        "audio_scale": (None, 1.0),
        "guidance_interval": ((0.0, 1.0),),
        "step_cache": (None, "none"),
        "tea_cache_l1_thresh": (0.0,),
    }
    for field, values in off.items():
        reason = family.refused.get(f"sampling.{field}")
        if reason is not None and sampling[field] not in values:
            raise FieldError(f"{name}: {reason}", f"sampling.{field}", "model.family")
