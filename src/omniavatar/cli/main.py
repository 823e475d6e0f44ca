"""The list of commands: `omniavatar generate | web | live | batch | plan | config show | download |
make-checkpoint | convert | demo | profile | benchmark | doctor | calibrate | clean | serve |
verify-provenance`.

Each command lies in one file and imports the code it runs inside its function, so that `--help` does not
load torch. Exit codes: docs/exit_codes.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from omniavatar.cli import (
    batch,
    benchmark,
    calibrate,
    checkpoint,
    clean,
    config,
    demo,
    doctor,
    generate,
    live,
    plan,
    profile,
    serve,
    verify_provenance,
    web,
)
from omniavatar.cli.common import DEBUG_VARIABLE, leave_at_once, print_error
from omniavatar.cli.layout import CONTEXT, EVERYDAY, MEASURING, MODELS, SERVERS, Command, Groups, examples
from omniavatar.errors import OutputError
from omniavatar.parallel.threads import bound_spinning

app = typer.Typer(
    name="omniavatar",
    cls=Groups,
    help="Make talking-head videos of any length from a portrait, a voice and a prompt "
    "(OmniAvatar on Wan 2.1).",
    epilog=examples(
        "omniavatar demo                          # needs neither a GPU nor a download",
        "omniavatar demo --image me.png --audio me.wav",
        "omniavatar COMMAND --help                # options and examples of one command",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
config_app = typer.Typer(no_args_is_help=True, help="Show the configuration.", rich_markup_mode=None)


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
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Print the traceback of a bug; it may also follow the command."),
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


def _add(group: str, function: Callable[..., None], *lines: str, name: str | None = None) -> None:
    """Register a command in a group of the help, with examples."""
    app.command(name, cls=Command, rich_help_panel=group, epilog=examples(*lines))(function)


_add(
    EVERYDAY,
    generate.generate,
    'omniavatar generate --prompt "A woman talks" --image face.jpg --audio talk.wav -o out.mp4',
    "omniavatar generate -c configs/inference.yaml --input_file requests.txt --gpus 0,1",
    'omniavatar generate -c pocket --prompt "A man talks" --image face.png --hp=num_steps=2,seed=1',
)
_add(
    EVERYDAY,
    demo.demo,
    "omniavatar demo",
    "omniavatar demo --image me.png --audio me.wav",
    "omniavatar demo -c configs/inference_1.3B.yaml -o demo.mp4",
)
_add(
    EVERYDAY,
    web.web,
    "omniavatar web --demo                    # a page in the browser; no GPU, no download",
    "omniavatar web -c configs/inference_1.3B.yaml",
)
_add(
    EVERYDAY,
    live.live,
    "omniavatar live --demo                   # a page with the packaged model",
    'omniavatar live --image face.jpg --prompt "A woman talks" --audio talk.wav -o out.mp4',
    'omniavatar live --image face.jpg --prompt "A woman talks" --serve',
)
_add(
    EVERYDAY,
    plan.plan,
    "omniavatar plan --image face.jpg --audio talk.wav",
    "omniavatar plan -c configs/inference.yaml --minutes 5 --deadline 20min",
)
_add(EVERYDAY, doctor.doctor, "omniavatar doctor")
_add(EVERYDAY, clean.clean, "omniavatar clean", "omniavatar clean outputs --yes")
_add(
    EVERYDAY,
    verify_provenance.verify_provenance,
    "omniavatar verify-provenance out.mp4",
    "omniavatar verify-provenance out.mp4 --trust studio_roots.pem",
    name="verify-provenance",
)
config_app.command("show", cls=Command, epilog=examples("omniavatar config show -c pocket --explain"))(
    config.show
)
app.add_typer(config_app, name="config", rich_help_panel=EVERYDAY)
_add(
    SERVERS,
    batch.batch,
    "omniavatar batch -c configs/inference_1.3B.yaml --input_file requests.jsonl",
    "omniavatar batch -c configs/inference.yaml --input_file requests.jsonl --gpus-per-job 2",
    "omniavatar batch -c pocket --input_file requests.jsonl --gpus cpu --workers 4",
)
app.add_typer(
    serve.app,
    name="serve",
    rich_help_panel=SERVERS,
    epilog=examples(
        "omniavatar serve                         # on this machine only, with the packaged model",
        "omniavatar serve --config server.yaml --port 8080",
        "omniavatar serve keys add alice",
    ),
)
_add(MODELS, checkpoint.download, "omniavatar download 1.3B")
_add(
    MODELS,
    checkpoint.convert,
    "omniavatar convert -c configs/inference.yaml --hp=quantize=fp8 --out avatar-14B-fp8.safetensors",
)
_add(
    MODELS,
    checkpoint.make_checkpoint,
    "omniavatar make-checkpoint --scale nano --out pretrained_models/nano",
    name="make-checkpoint",
)
_add(MEASURING, profile.profile, "omniavatar profile -c pocket --json report.json")
_add(MEASURING, benchmark.benchmark, "omniavatar benchmark --configs configs/inference_1.3B.yaml")
_add(MEASURING, calibrate.calibrate, "omniavatar calibrate -c configs/inference_1.3B.yaml --verify")


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
    bound_spinning()
    values = list(sys.argv[1:] if arguments is None else arguments)
    app(args=values, prog_name="omniavatar", obj=values)


VIDEO_COMMANDS = frozenset(("generate", "batch", "demo"))
"""Commands whose result is a video and not what they print."""


def command(arguments: Sequence[str] | None = None) -> None:
    """Run `main` and end the process without the interpreter's slow shutdown (`leave_at_once`).

    A lost stdout or stderr (the reader left, the disk is full) does not end the command. If stdout was lost
    otherwise than by its reader, a command that only prints a report ends with the code of `OutputError`.
    """
    from omniavatar.cli.terminal import is_incomplete, safe_streams

    values = list(sys.argv[1:] if arguments is None else arguments)
    with safe_streams() as outlets:
        try:
            main(values)
        except SystemExit as leaving:
            code = leaving.code
            sys.stdout.flush()
            if outlets and is_incomplete(outlets[0]):
                print_error(f"stdout: cannot be written ({outlets[0].lost}); what it lacks is lost")
                if not code and VIDEO_COMMANDS.isdisjoint(values):
                    code = OutputError.exit_code
            leave_at_once(code)
            raise SystemExit(code) from None
