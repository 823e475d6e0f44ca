"""Pages and pictures that are made from the code are current, complete, and follow the code."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from docs.generate import api, rooms, settings
from docs.generate.__main__ import stale

import omniavatar
from omniavatar.config.identity import NEUTRAL_FIELDS
from omniavatar.config.schema import ModelConfig, PipelineConfig, RuntimeConfig, SamplingConfig, VideoConfig

REPOSITORY = Path(__file__).parents[3]
DOCS = REPOSITORY / "docs"


def test_generated_files_are_current() -> None:
    assert not stale(), "run `python -m docs.generate`"


# Settings


def rows_of(page: str, key: str) -> list[list[str]]:
    found = [line for line in page.splitlines() if line.startswith(f'| <a id="{key}"></a>')]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found]


def test_every_setting_has_one_row_with_default_values_meaning_and_effect() -> None:
    page = settings.page()
    for section, field in PipelineConfig.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, type(field.default))
        for key, leaf in settings.leaves(model):
            (row,) = rows_of(page, key)
            assert len(row) == 5 and all(row), key
            assert row[3] == " ".join((leaf.description or "").split()).replace("|", "\\|")
            neutral = f"{section}.{key.split('.')[0]}" in NEUTRAL_FIELDS
            assert row[4] == ("run" if neutral else "video"), key


@pytest.mark.parametrize(
    ("model", "key", "words"),
    [
        (SamplingConfig, "num_steps", "whole number, 1 to 1000"),
        (SamplingConfig, "sampler", "`euler`, `renoise`, `causal` or `bridge`"),
        (SamplingConfig, "audio_scale", "number, at least 0; or unset"),
        (SamplingConfig, "guidance_interval", "[low, high] with 0 <= low <= high <= 1, such as [0.0, 0.6]"),
        (SamplingConfig, "seed", "whole number, 0 to 2^63 - 1"),
        (VideoConfig, "image_sizes_720", "list of [height, width], multiples of 16"),
        (RuntimeConfig, "memory", "auto or a number of GB above 0, such as 10"),
        (RuntimeConfig, "fuse", "`true`, `false`; or unset"),
        (ModelConfig, "dit_path", "list of paths"),
    ],
)
def test_accepted_values_in_words(model: type, key: str, words: str) -> None:
    assert settings.values(key, dict(settings.leaves(model))[key]) == words


def test_fields_with_words_of_their_own_exist() -> None:
    known = {
        key
        for field in PipelineConfig.model_fields.values()
        for key, _ in settings.leaves(field.annotation)  # type: ignore[arg-type]
    }
    assert known >= settings.WRONG.keys() | settings.SPELT.keys()


def test_a_wrong_value_that_is_accepted_stops_the_page() -> None:
    field = dict(settings.leaves(RuntimeConfig))["device"]
    with pytest.raises(AssertionError, match="was accepted"):
        settings.accepted(field, "cpu")


# Python API


def test_every_public_name_has_an_entry() -> None:
    page = api.page()
    for name in omniavatar.__all__:
        assert f"## `{name}`\n" in page
    for member in ("from_config", "generate", "stream"):
        assert f"### `AvatarPipeline.{member}`\n" in page


def test_signatures_are_python() -> None:
    """The page's code is what a reader copies: signatures parse, and show no addresses of objects."""
    page = api.page()
    signatures = re.findall(r"```python\n(\w+\(.*?) -> .*?\n```", page, re.S)
    assert len(signatures) > 3 and " at 0x" not in page
    for signature in signatures:
        ast.parse(f"def {signature}: ...")


def test_docstrings_become_markdown() -> None:
    class Shape:
        """A shape.

            code()

        size, length: pixels.
        """

    assert api.prose(Shape) == [
        "A shape.",
        "",
        "```",
        "code()",
        "```",
        "",
        "- `size, length`: pixels.",
        "",
    ]


# Picture of the rooms


def contract() -> list[set[str]]:
    """The layers of pyproject.toml, read in another way than the picture's."""
    layers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = (entry["layers"] for entry in layers if entry["type"] == "layers")
    return [set(re.findall(r"omniavatar\.(\w+)", layer)) for layer in found]


def test_the_picture_shows_the_rooms_of_the_contract_layer_by_layer() -> None:
    picture = (DOCS / "images" / "rooms.svg").read_text()
    drawn: dict[str, set[str]] = {}
    for top, room in re.findall(r'y="(\d+)" text-anchor="middle" font-size="16"[^>]*>(\w+)<', picture):
        drawn.setdefault(top, set()).add(room)
    package = REPOSITORY / "src" / "omniavatar"
    here = {path.stem for path in package.iterdir()} - {"__init__", "__pycache__", "py"}
    expected = [layer & here for layer in contract()]
    assert [drawn[top] for top in sorted(drawn, key=int)] == [layer for layer in expected if layer]


def test_the_table_of_rooms_names_those_of_the_contract() -> None:
    text = (DOCS / "structure.md").read_text()
    table = text.split("## The rooms")[1].split("## The walk")[0]
    named = set(
        re.findall(
            r"`(\w+)(?:/|\.py)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)
        )
    )
    picture = {room for layer in rooms.contract(REPOSITORY / "pyproject.toml") for room in layer}
    assert named == picture


def test_a_room_without_words_is_an_error() -> None:
    with pytest.raises(KeyError):
        rooms.picture([["cellar"]])
