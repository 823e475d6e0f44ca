"""Loads a `PipelineConfig` from files and overrides, with the origin of each value.

Later layers override earlier ones: defaults, the checkpoint's `config.json` (in `exp_path`), the YAML file,
`--hp`. An empty value in a file (`audio_scale:`) keeps the value of the layer below, as in the original code.
An unknown key is an error that suggests the nearest valid key. Only `config.json`, which the user did not
write, may have other (training) keys; `LoadedConfig.warnings` lists them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from omniavatar.config.identity import flat_values
from omniavatar.config.schema import DitOverrides, PipelineConfig
from omniavatar.config.syntax import Entry, parse_overrides, read_yaml
from omniavatar.config.values import IGNORED_KEYS, POCKET_WEIGHTS, FieldError, path_text
from omniavatar.errors import ConfigError
from omniavatar.text import cut, quoted, read_json, read_text

Overrides = Sequence[str] | Mapping[str, Any]

MOST_BYTES = 1_000_000
"""Of a YAML file, and of a checkpoint's config.json."""
PACKAGED = {
    "pocket": POCKET_WEIGHTS.parent / "pocket.yaml",
    "pocket-live": POCKET_WEIGHTS.parent / "pocket_live.yaml",
}
"""Configurations by the names that find them from any folder."""

_SECTIONS = {
    name: set(field.annotation.model_fields)
    for name, field in PipelineConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
_SECTION_OF = {leaf: section for section, leaves in _SECTIONS.items() for leaf in leaves}
_DIT_KEYS = ("model_config", "dit_config")
_NESTED = frozenset((*_SECTIONS, *_DIT_KEYS))


_WORDING = {
    "Input should be": "must be",
    "Tuple should have": "must be a list with",
    " after validation": "",
    "valid tuple": "list",
    "valid string": "text",
    "Extra inputs are not permitted": "has an unknown key",
    "Field required": "lacks a key",
    "valid dictionary or instance of DitOverrides": "mapping",
    "valid dictionary or instance of LoraSetting": "mapping {path, strength}",
}


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where it came from.

    origins: origin of each dotted leaf.
    ignored: keys without effect, with the reason.
    warnings: one line each.
    """

    config: PipelineConfig
    origins: Mapping[str, str]
    ignored: Mapping[str, str]
    warnings: tuple[str, ...]


def load_config(path: str | Path | None, overrides: Overrides = ()) -> LoadedConfig:
    """The configuration from `path`, the checkpoint's config.json and `overrides`.

    Relative paths in the configuration refer to the current directory, as in the original code.

    path: a YAML file, `pocket` or `pocket-live` for the packaged models (`./pocket` for a file of that
        name), or None.
    overrides: `--hp` texts, or a mapping of flat or dotted keys to values.

    Raises ConfigError with a message of one line.
    """
    path = PACKAGED.get(str(path), path)
    layers = [] if path is None else read_yaml(_text(path), str(path), _NESTED)
    changes = _override_entries(overrides)
    ignored: dict[str, str] = {}
    own = [*_resolve(layers, ignored, keep_null=False), *_resolve(changes, ignored, keep_null=True)]
    exp_path = next((entry for entry in reversed(own) if entry.key == "model.exp_path"), None)
    below, training_keys = _checkpoint_entries(exp_path)
    warnings = [f"{key} has no effect: {reason}" for key, reason in ignored.items()]
    if training_keys:
        assert exp_path is not None
        warnings.append(f"{exp_path.value}/config.json: ignored keys: {', '.join(sorted(training_keys))}")
    entries = [*below, *own]
    given = {entry.key: entry.origin for entry in entries}
    config = _build(entries, str(path) if path is not None else "config")
    origins = {leaf: given.get(leaf, "default") for leaf in flat_values(config)}
    within = [origin for key, origin in given.items() if key.startswith("model.dit_config.")]
    if within:
        origins["model.dit_config"] = ", ".join(dict.fromkeys(within))
    return LoadedConfig(config, origins, ignored, tuple(warnings))


def _text(path: str | Path) -> str:
    missing = (
        "config file not found; choose one in configs/, or use pocket or pocket-live for the packaged models"
    )
    return read_text(path, MOST_BYTES, ConfigError, missing)


def _override_entries(overrides: Overrides) -> list[Entry]:
    if isinstance(overrides, Mapping):
        return list(_flatten(overrides, "overrides", ""))
    if isinstance(overrides, str):
        return parse_overrides(overrides)
    return [entry for text in overrides for entry in parse_overrides(text)]


def _flatten(values: Mapping[str, Any], origin: str, prefix: str) -> Iterable[Entry]:
    for key, value in values.items():
        if key in _NESTED and isinstance(value, Mapping):
            yield from _flatten(value, origin, f"{prefix}{key}.")
        else:
            yield Entry(prefix + str(key), value, origin)


def _resolve(entries: Iterable[Entry], ignored: dict[str, str], *, keep_null: bool) -> list[Entry]:
    """Entries with full keys (`model.dit_config.in_dim`); keys without effect move to `ignored`."""
    resolved: list[Entry] = []
    for entry in entries:
        if entry.key in IGNORED_KEYS:
            if entry.value is not None:
                ignored[entry.key] = IGNORED_KEYS[entry.key]
            continue
        key = _full_key(entry)
        if entry.value is not None or keep_null:
            resolved.append(Entry(key, entry.value, entry.origin))
    return resolved


def _full_key(entry: Entry) -> str:
    parts = entry.key.split(".")
    section = parts.pop(0) if parts[0] in _SECTIONS and len(parts) > 1 else None
    leaf, inner = parts[0], parts[1:]
    leaf = "dit_config" if leaf in _DIT_KEYS else leaf
    known = leaf in _SECTION_OF and section in (None, _SECTION_OF[leaf])
    if known and leaf == "dit_config" and len(inner) == 1:
        known = inner[0] in DitOverrides.model_fields
    elif inner:
        known = False
    if known:
        return ".".join((_SECTION_OF[leaf], leaf, *inner))
    from omniavatar.config.hints import hint, plain_word

    found = hint(entry.key, {plain_word(entry.key): cut(str(entry.value))})
    remedy = f"; {found.text(in_file=entry.origin != '--hp')}" if found else _nearest(entry.key)
    raise ConfigError(f"{entry.origin}: unknown key {cut(entry.key)}{remedy}")


def is_key(name: str) -> bool:
    """Whether `name` is a key of the configuration, without its section."""
    return name in _SECTION_OF


def _nearest(key: str) -> str:
    if key in _SECTIONS:
        return f"; {key} is a section: put its fields below it, or write {key}.<field>"
    if key.rpartition(".")[2] in _SECTION_OF:
        leaf = key.rpartition(".")[2]
        return f"; did you mean {_SECTION_OF[leaf]}.{leaf}?"
    names = [*_SECTION_OF, *IGNORED_KEYS, "model_config"]
    names += [f"model_config.{name}" for name in DitOverrides.model_fields]
    names += [f"{section}.{leaf}" for leaf, section in _SECTION_OF.items()]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    last = difflib.get_close_matches(key.rpartition(".")[2], names, n=1, cutoff=0.5)
    found = close or last
    return f"; did you mean {found[0]}?" if found else "; `omniavatar config show` lists all keys"


def _checkpoint_entries(exp_path: Entry | None) -> tuple[list[Entry], list[str]]:
    """Entries of `<exp_path>/config.json` and its unknown keys; both empty if the file does not exist."""
    if exp_path is None or not isinstance(exp_path.value, str | Path):
        return [], []
    try:
        path = path_text(exp_path.value) / "config.json"
    except ValueError as error:
        raise ConfigError(
            f"{exp_path.origin}: exp_path: {error}; got {quoted(str(exp_path.value))}"
        ) from None
    if not os.path.exists(path):
        return [], []
    values = read_json(path, MOST_BYTES, ConfigError, "download the file again")
    known = {key: value for key, value in values.items() if key in _SECTION_OF or key in _DIT_KEYS}
    silent: dict[str, str] = {}
    training = [key for key in values if key not in known and key not in IGNORED_KEYS]
    entries = _resolve(_flatten(known, str(path), ""), silent, keep_null=False)
    return entries, training


def _build(entries: Iterable[Entry], where: str) -> PipelineConfig:
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for entry in entries:
        *folders, leaf = entry.key.split(".")
        section = tree
        for folder in folders:
            inner = section.setdefault(folder, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{entry.origin}: {entry.key}: {folder} is set to {quoted(inner)}, not to a mapping; "
                    "remove one of the two"
                )
            section = inner
        section[leaf] = dict(entry.value) if isinstance(entry.value, dict) else entry.value
        origins[entry.key] = entry.origin
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error, origins, where)) from error


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _value_at(tree: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings; None if it is not set."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _one_line(error: ValidationError, origins: Mapping[str, str], where: str) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    cause = first.get("ctx", {}).get("error")
    parts = [str(part) for part in first["loc"]]
    value = first["input"]
    if isinstance(cause, FieldError):
        keys = [".".join((*parts[:1], field)) for field in cause.fields]
        given = [(key, _value_at(value, field)) for key, field in zip(keys, cause.fields, strict=True)]
        shown = ", ".join(f"{_leaf(key)} {quoted(each)}" for key, each in given if each is not None)
        origin = next((origins[key] for key in keys if key in origins), where)
        name, message = _leaf(keys[0]), str(cause)
    else:
        depth = 3 if parts[:2] == ["model", "dit_config"] and len(parts) > 2 else 2
        origin = origins.get(".".join(parts[:depth]), where)
        name, message, shown = parts[:depth][-1], str(cause or first["msg"]), quoted(value)
    for pydantic_text, text in _WORDING.items():
        message = message.replace(pydantic_text, text)
    shown = f"; got {cut(shown)}" if shown else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{origin}: {name}: {message}{shown}{more}"
