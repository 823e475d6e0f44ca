"""YAML as configurations use it: PyYAML's safe loader with limits and one kind of numbers.

Numbers are decimal. Aliases count as often as they are used, so a small file cannot become a large value.
Only the tags of plain YAML values are read, and only for values that fit them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from omniavatar.text import MOST_DIGITS, cut, quoted

MOST_LEVELS = 20
"""Levels of lists and mappings."""
MOST_VALUES = 10_000
"""Keys, texts, numbers, lists and mappings in one file, with aliases counted as often as they are used."""

_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_REAL = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NULL = re.compile(r"|~|null|Null|NULL|None")
_TRUE = re.compile(r"yes|Yes|YES|true|True|TRUE|on|On|ON")
_FALSE = re.compile(r"no|No|NO|false|False|FALSE|off|Off|OFF")
_TAG = "tag:yaml.org,2002:"


class YamlError(ValueError):
    """A text that is not YAML, or beyond the limits.

    line: counted from 1; 0 if it is not known.
    """

    def __init__(self, problem: str, line: int = 0) -> None:
        super().__init__(problem)
        self.line = line


def number(text: str) -> int | float | None:
    """The number that `text` spells, or None. Raises YamlError for a whole number of too many digits."""
    if _WHOLE.fullmatch(text):
        if len(text) > MOST_DIGITS:
            raise YamlError(f"a number of {len(text)} digits")
        return int(text)
    return float(text) if _REAL.fullmatch(text) else None


def compose(text: str) -> yaml.Node | None:
    """The tree of a YAML document, None if it is empty. Raises YamlError."""
    try:
        loader = _Loader(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
            return node
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise YamlError(str(error.problem or error.context), line) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None


def assignments(text: str, nested: frozenset[str]) -> Iterator[tuple[str, Any, int]]:
    """Key, value and line of each entry of a YAML mapping; mappings below a key in `nested` are flattened.

    Raises YamlError, also if the text is not a mapping.
    """
    node = compose(text)
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise YamlError("must consist of `key: value` lines")
    yield from _flat(node, nested, "")


def _flat(node: yaml.MappingNode, nested: frozenset[str], prefix: str) -> Iterator[tuple[str, Any, int]]:
    for key_node, value_node in pairs(node):
        key = prefix + key_node.value
        if key_node.value in nested and isinstance(value_node, yaml.MappingNode):
            yield from _flat(value_node, nested, f"{key}.")
        else:
            yield key, value(value_node), key_node.start_mark.line + 1


def pairs(node: yaml.MappingNode) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a mapping. Raises YamlError for a repeated key and for one that is not text."""
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _error(key, "a key must be text, not a list or a mapping")
        if key.value in seen:
            raise _error(key, f"key {cut(key.value)} occurs twice")
        seen.add(key.value)
    return list(node.value)


def value(node: yaml.Node | None) -> Any:
    """The value of a tree: None, bool, int, float, str, list or dict. Raises YamlError."""
    if node is None:
        return None
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return {value(key): value(inner) for key, inner in pairs(node)}
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [value(inner) for inner in node.value]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, kind)
    raise _error(node, f"could not determine a constructor for the tag {cut(node.tag)}; remove it")


def _scalar(node: yaml.ScalarNode, kind: str) -> Any:
    text = str(node.value)
    if kind == "str":
        return text
    if kind == "null" and _NULL.fullmatch(text):
        return None
    if kind == "bool" and (_TRUE.fullmatch(text) or _FALSE.fullmatch(text)):
        return _TRUE.fullmatch(text) is not None
    if kind in ("int", "float"):
        try:
            found = number(text)
        except YamlError as error:
            raise _error(node, str(error)) from None
        if found is not None and (kind == "float" or isinstance(found, int)):
            return float(found) if kind == "float" else found
    if kind in ("null", "bool", "int", "float"):
        raise _error(node, f"{quoted(text)} is not a {kind}")
    raise _error(node, f"could not determine a constructor for the tag {cut(node.tag)}; remove it")


def _error(node: yaml.Node, problem: str) -> YamlError:
    return YamlError(problem, node.start_mark.line + 1)


class _Loader(yaml.SafeLoader):
    """Which plain texts are numbers, null and true, and the limits on size and depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        self._level += 1
        if self._level > MOST_LEVELS:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MOST_LEVELS} levels deep", problem_mark=mark
            )
        alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        if node is not None:
            self._measure(node, alias, mark)
        return node

    def _measure(self, node: yaml.Node, alias: bool, mark: Any) -> None:
        """Record the number of values in `node` and its depth, from those of the nodes in it."""
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias stands inside of what it names", problem_mark=mark)
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes = [self._sizes[id(part)] for part in inner]
        size, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        self._sizes[id(node)] = size, depth
        if size > MOST_VALUES or len(self._sizes) > MOST_VALUES:
            problem = f"more than {MOST_VALUES} values"
        elif depth > MOST_LEVELS:
            problem = f"nested more than {MOST_LEVELS} levels deep"
        else:
            return
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("int", _WHOLE.pattern, "-+0123456789"),
    ("float", _REAL.pattern, "-+.0123456789"),
    ("bool", f"{_TRUE.pattern}|{_FALSE.pattern}", "yYnNtTfFoO"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(f"^(?:{_NULL.pattern})$"), ["", "~", "n", "N"])
