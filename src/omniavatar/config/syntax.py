"""The two notations of a configuration: YAML files and `--hp=key=value,...` texts.

YAML is read by PyYAML's safe loader with three differences. `14e-2` and `1e8` are numbers (PyYAML's YAML 1.1
reads them as text). A plain `None` is null, as in the files of the original code. A repeated key is an error.
Every value keeps its line number.

In `--hp` texts, commas separate assignments. Quoted texts, `[...]` and `{...}` may contain commas and are
read as YAML flow values. `true/false`, `null/None` and numbers are recognised; anything else is text up to
the next comma.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from omniavatar.errors import ConfigError

_INT = re.compile(r"[-+]?\d+")
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "": None}
"""Words with a value. `none` is missing on purpose: it is a text that `step_cache` accepts."""
_CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Entry:
    """One assignment.

    key: dotted key, as written.
    origin: `file:12` or `--hp`.
    """

    key: str
    value: Any
    origin: str


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_repeats(node)
        return super().construct_mapping(node, deep)


def _refuse_repeats(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key} occurs twice", problem_mark=key_node.start_mark)
        seen.add(key)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


def read_yaml(text: str, name: str, nested: frozenset[str]) -> list[Entry]:
    """Entries of a YAML mapping in file order.

    name: name of the file in errors and origins.
    nested: keys whose mapping is flattened: `sampling: {num_steps: 5}` gives the entry `sampling.num_steps`.

    Raises ConfigError with the line number for bad syntax, a repeated key, or a top level that is not a
    mapping.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name}: must consist of `key: value` lines")
        return list(_entries(loader, node, name, nested, ""))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _entries(
    loader: _Loader, node: yaml.MappingNode, name: str, nested: frozenset[str], prefix: str
) -> Iterator[Entry]:
    _refuse_repeats(node)
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        if key_node.value in nested and isinstance(value_node, yaml.MappingNode):
            yield from _entries(loader, value_node, name, nested, f"{key}.")
        else:
            value = loader.construct_object(value_node, deep=True)
            yield Entry(key, value, f"{name}:{key_node.start_mark.line + 1}")


def parse_value(text: str, key: str = "value") -> Any:
    """The value of one `--hp` assignment; lists, mappings and quoted texts are read as YAML."""
    text = text.strip()
    if text[:1] in ("[", "{", '"', "'"):
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or " ".join(str(error).split())
            raise ConfigError(f"--hp: {key}: cannot read {text!r}: {problem}") from error
        finally:
            loader.dispose()
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse_overrides(text: str) -> list[Entry]:
    """Assignments of one `--hp` text such as `num_steps=25,image_sizes_720=[[400,720],[720,720]]`."""
    entries: list[Entry] = []
    position = 0
    while position < len(text):
        stop = _assignment_end(text, position)
        part = text[position:stop].strip()
        position = stop + 1
        if not part:
            continue
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--hp: {part!r} is not key=value; write --hp=num_steps=25,seed=1, with quotes around texts "
                "that contain commas"
            )
        entries.append(Entry(key.strip(), parse_value(value, key.strip()), "--hp"))
    return entries


def _assignment_end(text: str, start: int) -> int:
    """Index of the comma after the assignment at `start`, or the text's length."""
    comma = text.find(",", start)
    equals = text.find("=", start)
    if equals < 0 or 0 <= comma < equals:
        return len(text) if comma < 0 else comma
    position = equals + 1
    while position < len(text) and text[position] == " ":
        position += 1
    if position < len(text) and text[position] in "[{\"'":
        position = _group_end(text, position)
    comma = text.find(",", position)
    return len(text) if comma < 0 else comma


def _group_end(text: str, start: int) -> int:
    """Index after the quoted text or bracket group that begins at `start`."""
    closers: list[str] = []
    position = start
    while position < len(text):
        letter = text[position]
        if letter in "\"'" and (position == start or text[position - 1] in " ,[{:"):
            position = _quote_end(text, position)
            if not closers:
                return position
            continue
        if letter in _CLOSING:
            closers.append(_CLOSING[letter])
        elif letter in "]}":
            if letter != closers.pop():
                break
            if not closers:
                return position + 1
        position += 1
    raise ConfigError(f"--hp: brackets do not match in {text[start:]!r}; close each [ and {{")


def _quote_end(text: str, start: int) -> int:
    quote = text[start]
    position = start + 1
    while position < len(text):
        if quote == '"' and text[position] == "\\":
            position += 2
        elif text[position] != quote:
            position += 1
        elif quote == "'" and text[position + 1 : position + 2] == "'":
            position += 2
        else:
            return position + 1
    raise ConfigError(f"--hp: quote not closed in {text[start:]!r}; add {quote}")
