"""What the page offers for each model: words that act on it, and the three intents with their settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from omniavatar.assets import pocket
from omniavatar.config.schema import PipelineConfig
from omniavatar.serve.jobs.records import Json

PREVIEW, BALANCED, BEST = INTENTS = ("preview", "balanced", "best")
FEW_STEPS = 10
"""With at most this many steps configured, more of them still help."""


@dataclass(frozen=True)
class WordGroup:
    """Words of which a prompt has one. key: names the group in the page's strings."""

    key: str
    words: tuple[str, ...]


POCKET_WORDS = (
    WordGroup("expression", ("neutral", "smiling")),
    WordGroup("motion", ("still", "moving naturally", "lively")),
)
"""One wording for each thing that prompts change in the packaged model (docs/pocket.md)."""
OTHER_WORDS = (
    WordGroup("expression", ("with a neutral expression", "smiling", "serious")),
    WordGroup("motion", ("keeping still", "nodding slightly", "gesturing with the hands")),
    WordGroup("background", ("in a bright room", "in an office", "in front of a plain background")),
)
"""Starting points for models that understand sentences."""
OTHER_PROMPT = "A realistic video of a person speaking directly to the camera"


def word_groups(config: PipelineConfig) -> tuple[WordGroup, ...]:
    return POCKET_WORDS if pocket.holds(*config.model.dit_path) else OTHER_WORDS


def example_prompt(config: PipelineConfig) -> str:
    return pocket.PROMPT if pocket.holds(*config.model.dit_path) else OTHER_PROMPT


def intents(config: PipelineConfig) -> dict[str, Mapping[str, Json]]:
    """The settings of each intent that differs from the others; `balanced` or `best` is the configuration.

    Timesteps of a step-distilled model are fixed, so it has one intent only.
    """
    sampling = config.sampling
    if sampling.timesteps is not None:
        return {BALANCED: {}}
    steps = sampling.num_steps
    if steps <= FEW_STEPS:
        found = {PREVIEW: math.ceil(steps / 2), BALANCED: steps, BEST: math.ceil(steps * 1.5)}
    else:
        found = {PREVIEW: math.ceil(steps / 5), BALANCED: math.ceil(steps / 2), BEST: steps}
    return {
        name: {} if count == steps else {"num_steps": count}
        for name, count in found.items()
        if name == BALANCED or count != found[BALANCED]
    }
