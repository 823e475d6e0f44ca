"""What the page shows of the server, as one JSON object: models, settings, voice, talk, example."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from pydantic import BaseModel

from omniavatar.assets import pocket
from omniavatar.config.backends import registry
from omniavatar.config.identity import flat_values
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.serve.api.models import REQUEST_KEYS
from omniavatar.serve.api.replies import size_text
from omniavatar.serve.jobs.records import Json
from omniavatar.serve.page.words import example_prompt, intents, word_groups
from omniavatar.types import SamplingParams, StepCache

SHAPES = {"16:9": 16 / 9, "1:1": 1.0, "9:16": 9 / 16}
_NEAR = math.log(1.15)
"""How far a size may be from a shape that it stands for; 720x400 is 1.8."""
Kind: TypeAlias = Literal["whole", "number", "numbers", "text", "choice"]


class PageSetting(BaseModel):
    """A setting of a request. help: from the configuration's documentation."""

    key: str
    kind: Kind
    help: str
    value: Any
    choices: list[str] | None = None


class PageFixed(BaseModel):
    """A setting that holds for every video of the loaded model. value: as JSON."""

    key: str
    value: str
    help: str


class PageSize(BaseModel):
    """A size of the model. shape: the nearest of `SHAPES`, or None."""

    size: str
    shape: str | None


class PageModel(BaseModel):
    """A model. packaged: whether it knows rendered heads only. silence: seconds before the voice.

    words: by group. settings: that a request may change. fixed: all others.
    """

    id: str
    packaged: bool
    fps: int
    silence: float
    sizes: list[PageSize]
    prompt: str
    words: dict[str, list[str]]
    intents: dict[str, dict[str, Any]]
    settings: list[PageSetting]
    fixed: list[PageFixed]


class Offer(BaseModel):
    """Something that this server has, or what to do for it."""

    available: bool
    name: str = ""
    remedy: str = ""


class PageInfo(BaseModel):
    """Everything. price_per_hour: of this machine, 0 if none was given."""

    version: str
    models: list[PageModel]
    example: bool
    voice: Offer
    talk: Offer
    price_per_hour: float
    upload_bytes: int
    voice_seconds: float


def shape_of(size: tuple[int, int]) -> str | None:
    """The name of the shape of (height, width)."""
    height, width = size
    name = min(SHAPES, key=lambda each: abs(math.log(width / height / SHAPES[each])))
    return name if abs(math.log(width / height / SHAPES[name])) <= _NEAR else None


def page_model(name: str, config: PipelineConfig) -> PageModel:
    video = config.video
    return PageModel(
        id=name,
        packaged=pocket.holds(*config.model.dit_path),
        fps=video.fps,
        silence=video.silence_duration_s,
        sizes=[PageSize(size=size_text(size), shape=shape_of(size)) for size in video.sizes],
        prompt=example_prompt(config),
        words={group.key: list(group.words) for group in word_groups(config)},
        intents={key: dict(value) for key, value in intents(config).items()},
        settings=settings_of(config.sampling),
        fixed=fixed_of(config),
    )


def settings_of(sampling: SamplingConfig) -> list[PageSetting]:
    """What a request may set, with the configured values."""
    configured: dict[str, Json] = sampling.model_dump(mode="json")
    configured["step_cache"] = sampling.cache_policy
    configured["audio_scale"] = sampling.effective_audio_scale
    choices = {
        "sampler": [each.name for each in registry("sampling.sampler")],
        "step_cache": list(get_args(StepCache)),
    }
    types = get_type_hints(SamplingParams)
    return [
        PageSetting(
            key=key,
            kind="choice" if key in choices else _kind(types[key]),
            help=_help(SamplingConfig, key),
            value=configured[key],
            choices=choices.get(key),
        )
        for key in REQUEST_KEYS
    ]


def fixed_of(config: PipelineConfig) -> list[PageFixed]:
    """Every setting that a request may not change, with its value."""
    found = []
    for name, value in flat_values(config).items():
        section, _, key = name.partition(".")
        if key not in REQUEST_KEYS:
            text = json.dumps(value, ensure_ascii=False)
            found.append(PageFixed(key=key, value=text, help=_help(type(getattr(config, section)), key)))
    return found


def _help(section: type[BaseModel], key: str) -> str:
    return " ".join((section.model_fields[key].description or "").replace("`", "").split())


def _kind(annotation: Any) -> Kind:
    """How the page asks for a value of this type."""
    (kind,) = (each for each in get_args(annotation) if each is not type(None))
    return {int: "whole", float: "number", str: "text"}.get(kind, "numbers")  # type: ignore[return-value]
