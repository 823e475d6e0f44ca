"""The two notations of a configuration: YAML files and `--hp=key=value,...` texts.

Both know the same numbers: decimal digits with an optional sign, fraction and exponent, such as `25`, `0.5`
and `14e-2`. Every other spelling is text, such as `12:30`, `0x1F`, `010`, `1_000` and dates, which YAML 1.1
reads as numbers. A field that needs a number refuses it.

YAML is read by PyYAML's safe loader. A plain `None` is null, as in the files of the original code. A repeated
key is an error. Every value keeps its line number. Nesting, aliases and the number of values have limits.

In `--hp` texts, commas separate assignments. Quoted texts, `[...]` and `{...}` may contain commas and are
read as YAML flow values. `true/false`, `null/None` and numbers are recognised; anything else is text up to
the next comma.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omniavatar.errors import ConfigError
from omniavatar.text import cut, printable, quoted

_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None, "": None}
"""Words with a value. `none` is missing on purpose: it is a text that `step_cache` accepts."""
_CLOSING = {"[": "]", "{": "}"}
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Entry:
    """One assignment.

    key: dotted key, as written.
    origin: `file:12` or `--hp`.
    """

    key: str
    value: Any
    origin: str


def read_yaml(text: str, name: str, nested: frozenset[str]) -> list[Entry]:
    """Entries of a YAML mapping in file order.

    name: name of the file in errors and origins.
    nested: keys whose mapping is flattened: `sampling: {num_steps: 5}` gives the entry `sampling.num_steps`.

    Raises ConfigError with the line number for bad syntax, a repeated key, a limit that is exceeded, or a top
    level that is not a mapping.
    """
    from omniavatar.config.yaml_values import YamlError, assignments

    try:
        return [Entry(key, value, f"{name}:{line}") for key, value, line in assignments(text, nested)]
    except YamlError as error:
        line = f":{error.line}" if error.line else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error}") from None


def parse_value(text: str, key: str = "value") -> Any:
    """The value of one `--hp` assignment; lists, mappings and quoted texts are read as YAML."""
    from omniavatar.config.yaml_values import YamlError, compose, number
    from omniavatar.config.yaml_values import value as value_of

    text = text.strip()
    try:
        if text[:1] in ("[", "{", '"', "'"):
            return value_of(compose(text))
        if text in _WORDS:
            return _WORDS[text]
        found = number(text)
    except YamlError as error:
        raise ConfigError(f"--hp: {cut(key)}: cannot read {quoted(text)}: {error}") from None
    return text if found is None else found


def parse_overrides(text: str) -> list[Entry]:
    """Assignments of one `--hp` text such as `num_steps=25,image_sizes_720=[[400,720],[720,720]]`."""
    if found := _CONTROL.search(text):
        raise ConfigError(
            f"--hp: {quoted(text)} holds the control character {printable(found[0])}; remove it"
        )
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
                f"--hp: {quoted(part)} is not key=value; write --hp=num_steps=25,seed=1, with quotes around "
                "texts that contain commas"
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
    raise ConfigError(f"--hp: brackets do not match in {quoted(text[start:])}; close each [ and {{")


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
    raise ConfigError(f"--hp: quote not closed in {quoted(text[start:])}; add {quote}")
