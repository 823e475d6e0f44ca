"""What the commands share: options, and how errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from omniavatar.errors import ConfigError, OmniAvatarError

INTERRUPTED = 130
SOME_FAILED = 1

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", "-c", metavar="YAML", help="Configuration file, such as configs/inference.yaml."
    ),
]
HpOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hp",
        "-hp",
        "--hparams",
        metavar="KEY=VALUE,...",
        help="Override config values: num_steps=25,tea_cache_l1_thresh=14e-2,image_sizes_720=[[400,720]]. "
        "May be repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_error(text: str) -> None:
    """One line `error: ...` on stderr, red on a terminal."""
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error:{reset} {' '.join(text.split())}", file=sys.stderr)


def print_warning(text: str) -> None:
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def user_errors(
    report: Callable[[str], None] = print_error,
    on_interrupt: str = "interrupted",
) -> Iterator[None]:
    """Turn the user's errors into one line and their exit code, Ctrl-C into one line and 130.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except OmniAvatarError as error:
        report(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        report(on_interrupt)
        raise typer.Exit(INTERRUPTED) from None


def require_one_process() -> None:
    """Raise ConfigError when torchrun started several processes (environment variable WORLD_SIZE)."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"torchrun started {processes} processes, but one video on several GPUs is not in this version; "
            "use --nproc_per_node=1"
        )
