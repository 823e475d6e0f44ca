"""Words, intents and shapes that the page offers for a model."""

from __future__ import annotations

from typing import Any

import pytest
from training.motion import EXPRESSIONS, MOTIONS

from command_line import REPOSITORY
from omniavatar.assets import pocket
from omniavatar.config.load import load_config
from omniavatar.serve.page.info import page_model, shape_of
from omniavatar.serve.page.words import POCKET_WORDS, intents


def config_of(name: str, *overrides: str) -> Any:
    path = "pocket" if name == "pocket" else REPOSITORY / "configs" / f"{name}.yaml"
    return load_config(path, overrides).config


def test_the_words_of_the_packaged_model_are_those_it_was_trained_with() -> None:
    expression, motion = POCKET_WORDS
    for words, trained in ((expression.words, EXPRESSIONS), (motion.words, MOTIONS)):
        assert len(words) == len(trained)
        for word, wordings in zip(words, trained.values(), strict=True):
            assert word in wordings


@pytest.mark.parametrize(
    ("name", "overrides", "steps"),
    [
        ("pocket", (), {"preview": 2, "balanced": None, "best": 6}),
        ("pocket", ("num_steps=1",), {"balanced": None, "best": 2}),
        ("inference_1.3B", (), {"preview": 10, "balanced": 25, "best": None}),
        ("inference_1.3B_4steps", (), {"balanced": None}),
    ],
)
def test_intents_follow_the_configured_steps(
    name: str, overrides: tuple[str, ...], steps: dict[str, int | None]
) -> None:
    found = intents(config_of(name, *overrides))
    assert {key: value.get("num_steps") for key, value in found.items()} == steps


def test_a_large_model_is_not_the_packaged_one_and_has_three_shapes() -> None:
    config = config_of("inference_1.3B")
    model = page_model("large", config)
    assert not pocket.holds(*config.model.dit_path) and not model.packaged
    assert [each.shape for each in model.sizes] == ["16:9", "1:1", "9:16"]


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((400, 720), "16:9"),
        ((528, 960), "16:9"),
        ((1280, 720), "9:16"),
        ((512, 512), "1:1"),
        ((480, 640), None),
    ],
)
def test_shapes(size: tuple[int, int], shape: str | None) -> None:
    assert shape_of(size) == shape
