"""`omniavatar profile`: where the time of a video goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniavatar.assets import PORTRAIT, SPEECH
from omniavatar.cli.common import (
    SOME_FAILED,
    ConfigOption,
    HpOption,
    print_error,
    print_warning,
    prompt_for,
    require_one_process,
    user_errors,
)

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.engine.requests_file import RequestLine


def profile(
    config: ConfigOption,
    input_file: Annotated[
        Path | None,
        typer.Option("--input_file", "--input-file", help="Requests: one prompt@@image@@audio a line."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One request instead of a file: what the video shows.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Portrait of the request.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Voice of the request.")] = None,
    hp: HpOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the whole report as JSON.")
    ] = None,
    trace_file: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Write stages and steps as a Chrome trace (ui.perfetto.dev)."
        ),
    ] = None,
    torch_file: Annotated[
        Path | None,
        typer.Option(
            "--torch",
            metavar="FILE",
            help="Write torch.profiler's kernel trace of one window, which slows it.",
        ),
    ] = None,
) -> None:
    """Make videos and report where the time went: stages, windows, steps, TFLOP/s, memory.

    Without --input_file and --image it takes the packaged portrait and voice. Videos go to
    <output_dir>/profile and are always made from the start. Unreadable lines are reported and skipped.
    """
    if (input_file is not None and (prompt is not None or image is not None)) or (
        prompt is not None and image is None
    ):
        raise typer.BadParameter("give --input_file, or --prompt with --image, or neither")
    if image is None and audio is not None:
        raise typer.BadParameter("--audio belongs to --image")
    with user_errors():
        require_one_process()
        from omniavatar.cli.progress import make_display
        from omniavatar.cli.terminal import SafeConsole
        from omniavatar.config.load import load_config
        from omniavatar.engine.requests_file import RequestLine
        from omniavatar.measure.profile import profile_requests
        from omniavatar.measure.report_table import print_report
        from omniavatar.media.atomic import check_writable
        from omniavatar.plan.preview import with_family

        for path in (json_file, trace_file, torch_file):
            if path is not None:
                check_writable(path.absolute().parent)
        loaded = load_config(config, hp or ())
        for warning in loaded.warnings:
            print_warning(warning)
        bad = 0
        if input_file is not None:
            lines, bad = _lines(input_file, loaded.config)
        elif image is not None:
            family = with_family(loaded.config).family
            lines = [RequestLine(0, 0, prompt_for(family, prompt), image, audio)]
        else:
            lines = [RequestLine(0, 0, "A woman speaks", PORTRAIT, SPEECH)]
        with make_display("rich", False, sys.stderr) as display:
            run = profile_requests(loaded.config, lines, [display], torch_file)
        print_report(run.report, run.peak_memory, SafeConsole(), run.vae)
        _write_json(json_file, {"config": str(config), **run.as_dict()})
        _write_json(trace_file, run.trace)
        if bad:
            raise typer.Exit(SOME_FAILED)


def _lines(path: Path, config: PipelineConfig) -> tuple[list[RequestLine], int]:
    """The usable requests of the file, and the number of unusable ones, which are reported."""
    from omniavatar.engine.requests_file import RequestLine, read_requests
    from omniavatar.errors import InputError
    from omniavatar.plan.preview import with_family

    usable: list[RequestLine] = []
    bad = 0
    for line in read_requests(path, config.sampling, with_family(config).family.text):
        if isinstance(line, RequestLine):
            usable.append(line)
        else:
            print_error(str(line.error))
            bad += 1
    if not usable:
        raise InputError(f"{path}: no usable request; correct the lines reported above")
    return usable, bad


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        from omniavatar.media.atomic import atomic_write_json

        atomic_write_json(path, content)
