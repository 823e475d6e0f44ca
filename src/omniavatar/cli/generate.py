"""`omniavatar generate` and `omniavatar demo`: videos from the command line or an input file.

One pipeline makes the lines of an input file in order. A line with unusable inputs is reported and the next
line runs. An error that would affect every line (weights, device, disk) ends the run.
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
from omniavatar.cli.ranks import config_for_rank, parse_gpus, rank_reporting, start_ranks, team_of

if TYPE_CHECKING:
    from omniavatar.config.load import LoadedConfig
    from omniavatar.engine.recorder import RunRecorder
    from omniavatar.engine.requests_file import BadLine, RequestLine
    from omniavatar.parallel.team import Team


def generate(
    context: typer.Context,
    config: ConfigOption,
    prompt: Annotated[str | None, typer.Option(help="Text that describes the video.")] = None,
    image: Annotated[Path | None, typer.Option(help="Portrait (any image file).")] = None,
    audio: Annotated[
        Path | None,
        typer.Option(help="Voice (any audio file). Without it the video is silent and has seq_len frames."),
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
            help="File with many requests: one prompt@@image@@audio per line, or .jsonl or .csv.",
        ),
    ] = None,
    hp: HpOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise; default: the config's value.")] = None,
    quiet: QuietOption = False,
    log_format: LogOption = LogFormat.rich,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over instead of continuing an interrupted run.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,...|all",
            help="Make each video on all of these GPUs. With device=cpu, one process per number.",
        ),
    ] = None,
) -> None:
    """Make one video (--prompt, --image, --audio), or one per line of --input_file.

    To continue an interrupted run after its last finished window, give the same command again.
    """
    if (input_file is None) == (prompt is None):
        raise typer.BadParameter("give either --input_file, or --prompt and --image")
    if input_file is not None and any(value is not None for value in (image, audio, output)):
        raise typer.BadParameter("--image, --audio and --output only work with --prompt, not --input_file")
    if prompt is not None and image is None:
        raise typer.BadParameter("--image is missing; give a portrait")
    overrides = [*(hp or ()), *([] if seed is None else [f"seed={seed}"])]
    with rank_reporting(log_format, quiet) as (recorder, report, process):
        from omniavatar.config.load import load_config
        from omniavatar.engine.requests_file import RequestLine, read_requests

        loaded = load_config(config, overrides)
        numbers = None if gpus is None else parse_gpus(gpus)
        rank_config = config_for_rank(loaded.config, numbers, process)
        if numbers is not None and len(numbers) > process.world:
            start_ranks(context.obj, numbers)
            return
        loaded = replace(loaded, config=rank_config)
        if not process.leads:
            from omniavatar.engine.pipeline import AvatarPipeline

            with team_of(rank_config, process) as team:
                AvatarPipeline.from_config(rank_config, recorder=recorder, team=team).follow()
            return
        lines: Sequence[RequestLine | BadLine]
        if input_file is not None:
            lines = read_requests(input_file, loaded.config.sampling)
        else:
            assert prompt is not None and image is not None
            lines = [RequestLine(0, 0, prompt, image, audio)]
        resume = False if no_resume else None
        many = input_file is not None
        with team_of(rank_config, process) as team:
            failed = _generate_lines(
                loaded, lines, output, resume, recorder, report, quiet, many=many, team=team
            )
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
            help="Configuration to run instead of the packaged one, such as configs/inference_1.3B.yaml.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Video to write.")] = Path(
        "demo_out/demo.mp4"
    ),
    hp: HpOption = None,
    quiet: QuietOption = False,
    log_format: LogOption = LogFormat.rich,
) -> None:
    """Make a talking head from the packaged model, portrait and voice, on any machine.

    The packaged model is small and was trained on rendered heads only. Use --config for another model.
    """
    with reporting(log_format, quiet) as (recorder, report), user_errors(report, INTERRUPT_NOTE):
        require_one_process()
        from omniavatar.assets import SPEECH, pocket
        from omniavatar.config.load import load_config
        from omniavatar.engine.events import Message
        from omniavatar.engine.requests_file import RequestLine

        loaded = load_config(config or pocket.CONFIG, hp or ())
        request = RequestLine(0, 0, pocket.PROMPT, pocket.PORTRAIT, SPEECH)
        _generate_lines(loaded, [request], output, None, recorder, report, quiet, many=False, team=None)
        if config is None:
            text = "this small model was trained on rendered heads; it does not work on photographs"
            recorder.event(Message(text))
            text = f"the video is in {output.resolve()}; for real people, run `omniavatar download 1.3B`"
            recorder.event(Message(text))


def _generate_lines(
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
    """Generate every line and return how many failed. With `many`, an error of one line does not end the run.

    If other processes wait for the pipeline, it is made at once; otherwise, at the first readable line.
    """
    from omniavatar.engine.events import Message
    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.engine.requests_file import RequestLine
    from omniavatar.errors import InputError, ResumeError

    for warning in loaded.warnings:
        recorder.event(Message(warning, "warning"))
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
