"""The command line: `omniavatar generate | batch | plan | config show | download | make-checkpoint | demo |
profile | benchmark | doctor | calibrate`.

This file only lists the commands. Each has a file of its own that imports what it runs inside the command,
so that `--help` answers without loading torch. Exit codes: docs/exit_codes.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from omniavatar.cli import batch, benchmark, calibrate, checkpoint, config, doctor, generate, plan, profile
from omniavatar.cli.common import leave_at_once

app = typer.Typer(
    name="omniavatar",
    help="One portrait, one voice, one prompt: a talking video of any length (OmniAvatar on Wan 2.1).",
    epilog="Start with `omniavatar demo`, which needs neither a GPU nor a download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"omniavatar {version('omniavatar')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return None


app.command()(generate.generate)
app.command()(batch.batch)
app.command()(plan.plan)
config_app.command("show")(config.show)
app.add_typer(config_app, name="config")
app.command()(checkpoint.download)
app.command("make-checkpoint")(checkpoint.make_checkpoint)
app.command()(checkpoint.convert)
app.command()(generate.demo)
app.command()(profile.profile)
app.command()(benchmark.benchmark)
app.command()(doctor.doctor)
app.command()(calibrate.calibrate)


def grow_segments() -> None:
    """Take CUDA memory in segments that grow, unless the environment says otherwise.

    Otherwise the pieces left by a larger plan stay too small for the next one. `python -m benchmarks memory`
    takes no step down with it, and one at each limit without.
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (default: the process's own) and exit with its code."""
    grow_segments()
    given = list(sys.argv[1:] if arguments is None else arguments)
    app(args=given, prog_name="omniavatar", obj=given)


def command(arguments: Sequence[str] | None = None) -> None:
    """`main` as all that its process does: the process ends with it (`leave_at_once`)."""
    try:
        main(arguments)
    except SystemExit as ended:
        leave_at_once(ended.code)
        raise
