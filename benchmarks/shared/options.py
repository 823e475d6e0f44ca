"""Command-line options that several benchmarks have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def make_parser(module: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser for the benchmark in `module`; its docstring is the help text."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {module.rpartition('.')[2]}",
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_repeats(parser: argparse.ArgumentParser, default: int = 5) -> None:
    """`--repeats N`."""
    parser.add_argument("--repeats", type=int, default=default, help=f"timed runs (default: {default})")


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to rehearse")


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of `400x720`. Raises ValueError."""
    height, width = (int(side) for side in text.split("x"))
    return height, width


def add_config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """`--config FILE`, required where it has no default."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--config", required=default is None, default=default, help=f"configuration file{shown}"
    )


def add_hp(parser: argparse.ArgumentParser, default: Sequence[str] = ()) -> None:
    """`--hp KEY=VALUE ...`, several values at once or the option several times."""
    shown = f"; before them: {' '.join(default)}" if default else ""
    parser.add_argument(
        "--hp",
        nargs="+",
        action="extend",
        default=list(default),
        metavar="KEY=VALUE",
        help=f"settings that override the configuration{shown}",
    )


def words(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    """The numbers of a comma-separated list. Raises ValueError."""
    return [int(word) for word in words(text)]
