"""The help: groups, examples that exist, and nothing cut at any width."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from command_line import run
from omniavatar.cli import app
from omniavatar.cli.layout import GROUPS

COMMAND: Any = typer.main.get_command(app)
NAMES = [*(name for name in COMMAND.commands if name != "config"), "config show"]


def command(name: str) -> Any:
    first, *more = name.split()
    found = COMMAND.commands[first]
    return found.commands[more[0]] if more else found


def test_commands_are_listed_in_groups() -> None:
    text = run("--help").stdout
    places = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert places == sorted(places)
    listed = re.findall(r"^  ([a-z][a-z-]*) {2,}[A-Z]", text, re.MULTILINE)
    assert sorted(listed) == sorted(COMMAND.commands)
    assert listed[0] == "generate"
    assert text.index("Servers and batches") < text.index("\n  batch ") < text.index("Models and checkpoints")


@pytest.mark.parametrize("columns", ["60", "80", "120"])
@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_is_never_cut(name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = run(*name.split(), "--help").stdout
    assert "…" not in text
    joined = "".join(text.split())  # lines may be broken after a hyphen
    params = command(name).params if name else []
    for each in params:
        for option in (*each.opts, *each.secondary_opts):
            assert option in joined
        assert each.help is None or "".join(each.help.split()) in joined
    if not name:
        for each in COMMAND.commands.values():
            assert "".join(each.help.partition("\n\n")[0].split()) in joined


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_an_example_with_options_that_exist(name: str) -> None:
    lines = re.findall(r"^ +(omniavatar .*)$", run(*name.split(), "--help").stdout, re.MULTILINE)
    known = {option for each in command(name).params for option in (*each.opts, *each.secondary_opts)}
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        assert words[: len(name.split())] == name.split()
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known
