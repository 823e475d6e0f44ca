"""`omniavatar generate` and `omniavatar demo`: requests from the command line or an input file.

Lines of an input file run one after the other on one pipeline. A line whose inputs cannot be used is
reported and the next one runs; an error that would hit every line (weights, device, disk) ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.cli.common import (
    INTERRUPT_NOTE,
    SOME_FAILED,
    ConfigOption,
    HpOption,
    LogFormat,
    LogOption,
    QuietOption,
    reporting,
    require_one_process,
    user_errors,
)
from omniavatar.cli.ranks import one_of_several, parse_gpus, spread, start_ranks, team_of

if TYPE_CHECKING:
    from omniavatar.config.load import LoadedConfig
    from omniavatar.engine.recorder import RunRecorder
    from omniavatar.engine.requests_file import BadLine, RequestLine
    from omniavatar.parallel.team import Team


def generate(
    context: typer.Context,
    config: ConfigOption,
    prompt: Annotated[str | None, typer.Option(help="What the video shows.")] = None,
    image: Annotated[Path | None, typer.Option(help="Portrait (any image file).")] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Voice (any audio file); without it a silent video of seq_len frames.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Video to write; default: <output_dir>/000_<prompt>.mp4."),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input_file",
            "--input-file",
            help="Many requests: one prompt@@image@@audio a line, or .jsonl or .csv.",
        ),
    ] = None,
    hp: HpOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise; default: the config's.")] = None,
    quiet: QuietOption = False,
    log_format: LogOption = LogFormat.rich,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over instead of continuing an interrupted run.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,...|all",
            help="Make each video on these GPUs together. With device=cpu the numbers only count processes.",
        ),
    ] = None,
) -> None:
    """Make one video (--prompt, --image, --audio) or one for each line of --input_file.

    An interrupted run continues after its last finished window when the same command is given again.
    """
    if (input_file is None) == (prompt is None):
        raise typer.BadParameter("give either --input_file, or --prompt with --image")
    if input_file is not None and any(value is not None for value in (image, audio, output)):
        raise typer.BadParameter("--image, --audio and --output belong to --prompt, not to --input_file")
    if prompt is not None and image is None:
        raise typer.BadParameter("--image is missing: the model needs a portrait")
    overrides = [*(hp or ()), *([] if seed is None else [f"seed={seed}"])]
    with one_of_several(log_format, quiet) as (recorder, report, process):
        from omniavatar.config.load import load_config
        from omniavatar.engine.requests_file import RequestLine, read_requests

        loaded = load_config(config, overrides)
        numbers = None if gpus is None else parse_gpus(gpus)
        mine = spread(loaded.config, numbers, process)
        if numbers is not None and len(numbers) > process.world:
            start_ranks(context.obj, numbers)
            return
        loaded = replace(loaded, config=mine)
        if not process.leads:
            from omniavatar.engine.pipeline import AvatarPipeline

            with team_of(mine, process) as team:
                AvatarPipeline.from_config(mine, recorder=recorder, team=team).follow()
            return
        lines: Sequence[RequestLine | BadLine]
        if input_file is not None:
            lines = read_requests(input_file, loaded.config.sampling)
        else:
            assert prompt is not None and image is not None
            lines = [RequestLine(0, 0, prompt, image, audio)]
        resume = False if no_resume else None
        many = input_file is not None
        with team_of(mine, process) as team:
            failed = _run(loaded, lines, output, resume, recorder, report, quiet, many=many, team=team)
        if failed:
            report(f"{failed} of {len(lines)} lines of {input_file} failed")
            raise typer.Exit(SOME_FAILED)


def demo(
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="YAML",
            help="Config to run instead of the packaged model's, such as configs/inference_1.3B.yaml.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Video to write.")] = Path(
        "demo_out/demo.mp4"
    ),
    hp: HpOption = None,
    quiet: QuietOption = False,
    log_format: LogOption = LogFormat.rich,
) -> None:
    """A talking head from the packaged portrait and voice, on any machine, without a download.

    The packaged model is small and knows rendered heads only; other models: --config.
    """
    with reporting(log_format, quiet) as (recorder, report), user_errors(report, INTERRUPT_NOTE):
        require_one_process()
        from importlib.resources import as_file, files

        from omniavatar.assets import pocket
        from omniavatar.config.load import load_config
        from omniavatar.engine.requests_file import RequestLine

        loaded = load_config(config or pocket.CONFIG, hp or ())
        with as_file(files("omniavatar.assets")) as assets:
            request = RequestLine(0, 0, pocket.PROMPT, pocket.PORTRAIT, assets / "speech.flac")
            _run(loaded, [request], output, None, recorder, report, quiet, many=False, team=None)
        if config is None:
            text = "this model is small and knows rendered heads; photographs of real people are outside it"
            recorder.event("message", text=text, level="info")
            text = f"the video is {output.resolve()}; for real people: omniavatar download 1.3B"
            recorder.event("message", text=text, level="info")


def _run(
    loaded: LoadedConfig,
    lines: Sequence[RequestLine | BadLine],
    output: Path | None,
    resume: bool | None,
    recorder: RunRecorder,
    report: Callable[[str], None],
    quiet: bool,
    *,
    many: bool,
    team: Team | None,
) -> int:
    """Generate every line; returns how many failed. With `many`, a line's own errors do not end the run.

    The pipeline is made before the first line if other processes wait for it, else for the first good line.
    """
    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.engine.requests_file import RequestLine
    from omniavatar.errors import InputError, ResumeError

    for warning in loaded.warnings:
        recorder.event("message", text=warning, level="warning")
    config = loaded.config
    pipeline: AvatarPipeline | None = None
    if team is not None and team.size > 1:
        pipeline = AvatarPipeline.from_config(config, recorder=recorder, team=team)
    failed = 0
    for line in lines:
        if not isinstance(line, RequestLine):
            report(str(line.error))
            failed += 1
            continue
        pipeline = pipeline or AvatarPipeline.from_config(config, recorder=recorder)
        try:
            result = pipeline.generate(
                line.request(), output or line.target(config), resume=resume, index=line.index
            )
        except (InputError, ResumeError) as error:
            if not many:
                raise
            report(f"line {line.line}: {error}")
            failed += 1
            continue
        if quiet:
            typer.echo(str(result.output))
    return failed
