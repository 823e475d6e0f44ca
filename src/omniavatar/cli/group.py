"""The group of all commands: how an error that no command handled ends the program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from omniavatar.cli.common import UsageProblem, print_error, print_json_error, user_errors

ADVICE = "there is no option "
"""Beginning of a message that says itself what to write."""


class Commands(TyperGroup):
    """Reports a wrong option as one line, and as an event with `--log-format json`."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = debug_first(sys.argv[1:] if args is None else args)

        def run() -> Any:
            return super(Commands, self).main(
                arguments,
                prog_name,
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )

        return _ended(run, reporter(arguments)) if standalone_mode else run()


def _ended(run: Callable[[], Any], report: Callable[[str], None]) -> NoReturn:
    try:
        with user_errors(report):
            code = run()
    except typer.Exit as leaving:
        code = leaving.exit_code
    except typer.Abort:
        report("interrupted")
        code = 1
    except UsageProblem as problem:
        code = show_usage(problem, report)
    sys.exit(code if isinstance(code, int) else 0)


def show_usage(problem: Exception, report: Callable[[str], None]) -> int:
    """Report an error in the options; returns the exit code. Without any argument, the help is printed."""
    code: int = getattr(problem, "exit_code", 2)
    context = getattr(problem, "ctx", None)
    if type(problem).__name__ == "NoArgsIsHelpError":
        problem.show()  # type: ignore[attr-defined]
        return code
    text = problem.format_message().rstrip(".")  # type: ignore[attr-defined]
    command = "omniavatar" if context is None else context.command_path
    report(text if text.startswith(ADVICE) else f"{text}; see `{command} --help`")
    return code


def reporter(arguments: Sequence[str]) -> Callable[[str], None]:
    """How the command with these arguments reports an error."""
    chosen = [value for name, value in pairwise(arguments) if name == "--log-format"]
    chosen += [value.partition("=")[2] for value in arguments if value.startswith("--log-format=")]
    return print_json_error if "json" in chosen else print_error


def debug_first(arguments: Sequence[str]) -> list[str]:
    """`arguments` with a `--debug` behind the command moved to the front, where the program knows it."""
    rest = [value for value in arguments if value != "--debug"]
    return ["--debug", *rest] if len(rest) < len(arguments) else rest
