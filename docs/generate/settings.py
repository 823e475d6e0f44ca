"""docs/settings.md from the configuration's schema.

Key, default and meaning are the field's own. Allowed values are read off its type and its limits; a field
with a validator is given a wrong value, and the validator's message says what it accepts.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from omniavatar.config.backends import backend_rows
from omniavatar.config.identity import NEUTRAL_FIELDS
from omniavatar.config.schema import PipelineConfig
from omniavatar.config.values import IGNORED_KEYS
from omniavatar.types import SamplingParams

WRONG: dict[str, Any] = {
    "decoder": "?",
    "sampler": "?",
    "encoder": "?",
    "quantize": "?",
    "vae": "?",
    "sparse_backend": "?",
    "guidance_interval": (1.0, 0.0),
    "timesteps": (1.0, 2.0),
    "teacache_coefficients": "?",
    "device": "?",
    "memory": "?",
    "provenance_timestamp": "?",
}
"""For each field whose validator states what it accepts: a value that it refuses."""

SPELT: dict[str, str] = {
    "loras": "list of `{path, strength}`, or of paths",
    "step_cache_file": "`auto`, `none` or a path",
    "attention": "`auto`, `fastest` or a name that `omniavatar doctor` lists",
}
"""Fields whose type alone does not say what they accept."""

KINDS: dict[type, str] = {
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    str: "text",
    Path: "path",
}
LONG = 60
"""Characters of a default that still fit into a table."""

HEAD = """\
# Settings

<!-- Made by `python -m docs.generate` from src/omniavatar/config/schema.py. Do not edit this page. -->

This page lists every setting: its default, the values it accepts, and what it changes.

A setting is a key of the YAML file, or of `--hp`. The short and the dotted spelling name the same setting:

```
omniavatar generate --config configs/inference.yaml --hp num_steps=25,seed=1
omniavatar generate --config configs/inference.yaml --hp sampling.num_steps=25
omniavatar config show --config configs/inference.yaml     # every value and its source
```

An unknown key is an error that names the nearest valid key. `--hp` wins over the file, and the file wins over
the checkpoint's `config.json`.

The column "Changes" has one of two values:

- **video**: another value gives another video. Unfinished work made with the old value is refused.
- **run**: another value changes speed, memory, files or the number of GPUs. The video stays the same, at most
  up to rounding, so an interrupted run can continue with another value.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, field in PipelineConfig.model_fields.items():
        parts += [_section(section, _model(field))]
    parts += [_backends(), _requests(), _ignored()]
    return "\n".join(parts)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every setting of `model`, sections inside it opened."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def values(name: str, field: FieldInfo) -> str:
    """What a setting accepts, in words."""
    if name in SPELT:
        return SPELT[name]
    if name in WRONG:
        return accepted(field, WRONG[name])
    return _type_words(field.annotation, field.metadata)


def _section(section: str, model: type[BaseModel]) -> str:
    rows = [f"## {section}", "", model.__doc__ or "", ""]
    rows += ["| key | default | values | meaning | changes |", "|---|---|---|---|---|"]
    long: list[str] = []
    for name, field in leaves(model):
        default = _default(field.default)
        if len(default) > LONG:
            long += [f"Default of `{name}`:", "", f"> {_listed(field.default)}", ""]
            default = "see below the table"
        changes = "run" if f"{section}.{name.split('.')[0]}" in NEUTRAL_FIELDS else "video"
        meaning = " ".join((field.description or "").split())
        cells = [f'<a id="{name}"></a>`{name}`', default, values(name, field), meaning, changes]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*rows, "", *long])


def _backends() -> str:
    """The backends of every registry, one row each."""
    rows = [
        "## Choices of an implementation",
        "",
        "`omniavatar doctor` reports which of them this machine can use.",
        "**exact**: the model's frames change by rounding at most. **lossy**: the frames change.",
        "",
        "| key | value | frames | what it is | needs |",
        "|---|---|---|---|---|",
    ]
    for row in backend_rows():
        key = row.setting.rpartition(".")[2]
        frames = "exact" if row.exact else "lossy"
        rows.append(f"| [`{key}`](#{key}) | `{row.name}` | {frames} | {row.doc} | {row.needs} |")
    return "\n".join([*rows, ""])


def _requests() -> str:
    names = ", ".join(f"[`{name}`](#{name})" for name in SamplingParams.__dataclass_fields__)
    return (
        "## What one request may change\n\n"
        f"A line of an input file, or `SamplingParams` in Python, may change: {names}. "
        "What it leaves out keeps the configured value.\n"
    )


def _ignored() -> str:
    rows = ["## Keys of the original that have no effect", "", "They are accepted and reported.", ""]
    rows += ["| key | reason |", "|---|---|"]
    rows += [f"| `{name}` | {reason} |" for name, reason in IGNORED_KEYS.items()]
    return "\n".join([*rows, ""])


def _model(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    return field.annotation


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value == "":
        return "empty"
    if isinstance(value, tuple):
        return f"`{_listed(value)}`" if value else "empty"
    return f"`{value}`"


def _listed(value: Any) -> str:
    return f"[{', '.join(map(_listed, value))}]" if isinstance(value, tuple) else str(value)


def accepted(field: FieldInfo, wrong: Any) -> str:
    """What the field's validator says when it is given a wrong value, without "must be"."""
    annotated: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(annotated).validate_python(wrong)
    except ValidationError as error:
        (text,) = {_reason(row) for row in error.errors() if row["type"] in ("value_error", "literal_error")}
        return text.removeprefix("must be ").removeprefix("must ").replace("'", "`")
    raise AssertionError(f"{wrong!r} was accepted")


def _reason(error: ErrorDetails) -> str:
    return str(error["ctx"]["expected" if error["type"] == "literal_error" else "error"])


def _type_words(kind: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_words(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        words = [_type_words(part, metadata) for part in arguments if part is not type(None)]
        return ", ".join(words) + ("; or unset" if type(None) in arguments else "")
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_plural(_type_words(arguments[0], []))}"
        return "[height, width], multiples of 16"
    return KINDS[kind] + _limits(metadata)


def _plural(words: str) -> str:
    return words if words.startswith("[") else f"{words}s"


def _limits(metadata: list[Any]) -> str:
    found = {
        sign: getattr(entry, sign)
        for entry in _flat(metadata)
        for sign in ("ge", "gt", "le", "lt")
        if getattr(entry, sign, None) is not None
    }
    if "lt" in found and found["lt"] == 2**63:
        return f", {found['ge']} to 2^63 - 1"
    if {"ge", "le"} <= found.keys():
        return f", {found['ge']} to {found['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return "".join(f", {words[sign]} {limit}" for sign, limit in found.items())


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for entry in metadata:
        yield from entry.metadata if isinstance(entry, FieldInfo) else (entry,)
