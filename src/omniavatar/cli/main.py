"""The list of commands: `omniavatar generate | batch | plan | config show | download | make-checkpoint |
convert | demo | profile | benchmark | doctor | calibrate`.

Each command lies in one file and imports the code it runs inside its function, so that `--help` does not
load torch. Exit codes: docs/exit_codes.md.
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
    help="Make talking-head videos of any length from a portrait, a voice and a prompt "
    "(OmniAvatar on Wan 2.1).",
    epilog="Start with `omniavatar demo`: it needs neither a GPU nor a download.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(no_args_is_help=True, help="Show the configuration.")

GENERATE_EXAMPLES = """Examples:

omniavatar generate -c configs/inference_1.3B.yaml --prompt "A woman talks" --image face.jpg --audio talk.wav

omniavatar generate -c configs/inference.yaml --input_file requests.txt --gpus 0,1 --hp=num_steps=25,seed=1"""

BATCH_EXAMPLES = """Examples:

omniavatar batch -c configs/inference_1.3B.yaml --input_file requests.jsonl

omniavatar batch -c configs/inference.yaml --input_file requests.jsonl --gpus-per-job 2 -o s3://bucket/videos

omniavatar batch -c pocket --input_file requests.jsonl --gpus cpu --workers 4"""

DEMO_EXAMPLES = """Examples:

omniavatar demo

omniavatar demo -c configs/inference_1.3B.yaml -o demo.mp4"""

CONVERT_EXAMPLES = """Example:

omniavatar convert -c configs/inference.yaml --hp=quantize=fp8 --out avatar-14B-fp8.safetensors"""


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"omniavatar {version('omniavatar')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return None


app.command(epilog=GENERATE_EXAMPLES)(generate.generate)
app.command(epilog=BATCH_EXAMPLES)(batch.batch)
app.command()(plan.plan)
config_app.command("show")(config.show)
app.add_typer(config_app, name="config")
app.command()(checkpoint.download)
app.command("make-checkpoint")(checkpoint.make_checkpoint)
app.command(epilog=CONVERT_EXAMPLES)(checkpoint.convert)
app.command(epilog=DEMO_EXAMPLES)(generate.demo)
app.command()(profile.profile)
app.command()(benchmark.benchmark)
app.command()(doctor.doctor)
app.command()(calibrate.calibrate)


def grow_segments() -> None:
    """Let PyTorch grow its CUDA memory segments, unless the environment configures the allocator.

    With fixed segments, the free pieces left by one memory plan are too small for the next. The engine then
    falls back to a smaller plan although enough memory is free (`python -m benchmarks memory`).
    """
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments` (default: `sys.argv`) and exit with its code."""
    grow_segments()
    values = list(sys.argv[1:] if arguments is None else arguments)
    app(args=values, prog_name="omniavatar", obj=values)


def command(arguments: Sequence[str] | None = None) -> None:
    """Run `main` and end the process without the interpreter's slow shutdown (`leave_at_once`)."""
    try:
        main(arguments)
    except SystemExit as leaving:
        leave_at_once(leaving.code)
        raise
