"""How the help looks, and the answer to an unknown option: commands in groups, examples that can be copied.

The help is plain text in the width of the terminal, because the tables of Typer's rich help cut long option
names and examples at 80 columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand

from omniavatar.cli.group import ADVICE, Commands

EVERYDAY = "Everyday"
SERVERS = "Servers and batches"
MEASURING = "Measuring"
MODELS = "Models and checkpoints"
GROUPS = (EVERYDAY, SERVERS, MODELS, MEASURING)
CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
}


def examples(*lines: str) -> str:
    """The end of a command's help: one example a line, not wrapped."""
    return "\b\n" + "\n".join(
        ["Examples:" if len(lines) > 1 else "Example:", *(f"  {line}" for line in lines)]
    )


class Command(TyperCommand):
    """A command that explains options which other programs have."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            unknown = getattr(error, "option_name", None)
            known = {option for each in self.params for option in each.opts}
            text = advice(str(unknown), words, known) if unknown else None
            if text is None:
                raise
            no_such_option: Any = type(error)
            raise no_such_option(unknown, message=text, ctx=ctx) from None


def advice(option: str, words: Sequence[str], known: Collection[str]) -> str | None:
    """One line that names what to write for an unknown option, or None where nothing is known.

    words: the command line, which has the values.
    known: the options of the command.
    """
    from omniavatar.config.hints import FRAMES_PER_SECOND, Hint, hint, plain_word, shown

    given = _values(words)
    word = plain_word(option)
    found = hint(word, given)
    if found is None:
        from omniavatar.config.load import is_key

        if not is_key(word):
            return None
        found = Hint(word, shown(given.get(word, "")) or "VALUE")
    if found.name == "seq_len" and "--minutes" in known:
        found = Hint("--minutes", f"{int(found.value) / FRAMES_PER_SECOND / 60:.3g}")
    return f"{ADVICE}{option}: {found.text()}"


def _values(words: Sequence[str]) -> dict[str, str]:
    """The text after each option, as `--key value` or `--key=value`."""
    from omniavatar.config.hints import plain_word

    given: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            given[plain_word(name)] = value if equals else "" if after.startswith("--") else after
    return given


class Groups(Commands):
    """The list of commands, in groups."""

    command_class = Command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                about = inspect.cleandoc(command.short_help or command.help or "").partition("\n\n")[0]
                group = getattr(command, "rich_help_panel", None)
                rows[group if group in rows else EVERYDAY].append((name, " ".join(about.split())))
        width = max(len(name) for name in self.commands)
        for group, listed in rows.items():
            if listed:
                with formatter.section(group):
                    formatter.write_dl([(name.ljust(width), about) for name, about in listed])
