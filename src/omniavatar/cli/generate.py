"""`omniavatar generate`: videos from the command line or an input file.

One pipeline makes the lines of an input file in order. A line with unusable inputs is reported and the next
line runs. An error that would affect every line (weights, device, disk) ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omniavatar.cli.choose import CONFIGS, Choice, best_config
from omniavatar.cli.common import (
    SOME_FAILED,
    ConfigChoice,
    HpOption,
    LogFormat,
    LogOption,
    QuietOption,
    prompt_for,
    report_bug,
    whole_number,
)
from omniavatar.cli.ranks import config_for_rank, parse_gpus, rank_reporting, start_ranks, team_of
from omniavatar.errors import BUG

if TYPE_CHECKING:
    from omniavatar.config.load import LoadedConfig
    from omniavatar.engine.recorder import RunRecorder
    from omniavatar.engine.requests_file import BadLine, RequestLine
    from omniavatar.parallel.team import Team


def generate(
    context: typer.Context,
    config: ConfigChoice = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text that describes the video; FlashHead and LeapTalk take none.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Portrait (any image file). It decides the shape of the video.")
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option(
            help="Voice (any audio file). It decides the length of the video. Without it the video is "
            "silent and has seq_len frames."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Video (.mp4) or folder to write; default: <output_dir>/000_<prompt>.mp4, or the next "
            "number that is free.",
        ),
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
    seed: Annotated[
        int | None,
        typer.Option(
            parser=whole_number, metavar="<int>", help="Seed of the noise; default: the config's value."
        ),
    ] = None,
    quiet: QuietOption = False,
    log_format: LogOption = LogFormat.rich,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over instead of continuing an interrupted run.")
    ] = False,
    provenance: Annotated[
        bool | None,
        typer.Option(
            "--provenance/--no-provenance",
            help="Sign the video with a C2PA manifest; needs provenance_certificate and provenance_key.",
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,...|all",
            help="Make each video on all of these GPUs. With device=cpu, one process per number.",
        ),
    ] = None,
) -> None:
    """Make one video (--prompt, --image, --audio), or one per line of --input_file.

    The voice decides the length of the video, and the portrait decides its shape (`omniavatar plan` prints
    both). To continue an interrupted run after its last finished window, give the same command again.
    """
    if (input_file is None) == (prompt is None and image is None):
        raise typer.BadParameter("give either --input_file, or --prompt and --image")
    if input_file is not None and any(value is not None for value in (image, audio, output)):
        raise typer.BadParameter("--image, --audio and --output only work with --prompt, not --input_file")
    if prompt is not None and image is None:
        raise typer.BadParameter("--image is missing; give a portrait")
    overrides = [*(hp or ()), *([] if seed is None else [f"seed={seed}"])]
    if provenance is not None:
        overrides.append(f"provenance={str(provenance).lower()}")
    with rank_reporting(log_format, quiet) as (recorder, report, process):
        from omniavatar.cli.position import command_again
        from omniavatar.config.load import load_config
        from omniavatar.engine.events import Message
        from omniavatar.engine.requests_file import RequestLine, read_requests
        from omniavatar.plan.preview import with_family

        check_kinds(image, audio)
        words = list(context.obj or ())
        if config is None:
            config, reason = chosen_config(process.world)
            recorder.event(Message(reason))
            words += ["--config", str(config)]
        loaded = load_config(config, overrides)
        family = with_family(loaded.config).family
        if image is not None:
            prompt = prompt_for(family, prompt)
        numbers = None if gpus is None else parse_gpus(gpus)
        rank_config = config_for_rank(loaded.config, numbers, process)
        if numbers is not None and len(numbers) > process.world:
            start_ranks(words, numbers)
            return
        loaded = replace(loaded, config=rank_config)
        if not process.leads:
            from omniavatar.engine.pipeline import AvatarPipeline

            with team_of(rank_config, process) as team:
                AvatarPipeline.from_config(rank_config, recorder=recorder, team=team).follow()
            return
        lines: Sequence[RequestLine | BadLine]
        if input_file is not None:
            lines = read_requests(input_file, loaded.config.sampling, family.text)
        else:
            assert prompt is not None and image is not None
            lines = [RequestLine(0, 0, prompt, image, audio)]
        resume = False if no_resume else None
        many = input_file is not None
        with team_of(rank_config, process) as team:
            again = command_again(words)
            failed, bugs = make_lines(
                loaded, lines, output, resume, recorder, report, quiet, many=many, team=team, again=again
            )
        if failed:
            report(f"{failed} of {len(lines)} lines of {input_file} failed")
            raise typer.Exit(BUG if bugs else SOME_FAILED)


def chosen_config(processes: int) -> Choice:
    """The configuration to take without `--config`. Raises ConfigError for one of several processes."""
    from omniavatar.errors import ConfigError

    if processes > 1:  # they could choose differently, because each sees its own free memory
        raise ConfigError(
            "--config is missing; name the configuration where torchrun starts several processes"
        )
    return best_config(CONFIGS)


def check_kinds(image: Path | None, audio: Path | None) -> None:
    """Raise InputError if, by their names, `image` is a sound and `audio` is a picture."""
    from mimetypes import guess_type

    from omniavatar.errors import InputError

    kinds = [
        (guess_type(path.name)[0] or "").partition("/")[0] for path in (image, audio) if path is not None
    ]
    if kinds == ["audio", "image"]:
        raise InputError(
            f"--image {image} is a sound and --audio {audio} is a picture; "
            f"write --image {audio} --audio {image}"
        )


def silent_videos(loaded: LoadedConfig, lines: Sequence[RequestLine | BadLine]) -> list[str]:
    """A warning if requests have no voice, unless `seq_len` was set, which is the length of such videos.

    A family that makes its frames from a voice refuses such requests, so there is nothing to add.
    """
    from omniavatar.engine.requests_file import RequestLine
    from omniavatar.plan.preview import with_family

    usable = [line for line in lines if isinstance(line, RequestLine)]
    silent = sum(line.audio is None for line in usable)
    if not silent or loaded.origins["video.seq_len"] == "--hp":
        return []
    if with_family(loaded.config).family.chunk is not None:
        return []
    video = loaded.config.video
    seconds = f"{video.seq_len / video.fps:g} s"
    if len(lines) == 1:
        text = f"no --audio: the video is silent and {seconds} long"
    else:
        text = f"{silent} of {len(lines)} lines have no voice; their videos are silent and {seconds} long"
    return [f"{text}; give a voice, or set the number of frames: --hp=seq_len=N"]


def make_lines(
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
    again: str,
) -> tuple[int, int]:
    """Generate every line; returns how many failed, and how many of these by a bug.

    With `many`, an error of one line does not end the run. After a bug, the next line gets a new pipeline. If
    other processes wait for the pipeline, it is made at once; otherwise, at the first readable line.

    again: the command that continues after Ctrl-C.
    """
    from omniavatar.cli.position import Position
    from omniavatar.cli.terminal import say
    from omniavatar.engine.collisions import check_lines
    from omniavatar.engine.events import Message
    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.engine.recorder import RunRecorder
    from omniavatar.engine.requests_file import RequestLine
    from omniavatar.errors import OF_ONE_LINE, OmniAvatarError, translated

    for warning in (*loaded.warnings, *silent_videos(loaded, lines)):
        recorder.event(Message(warning, "warning"))
    position = Position()
    recorder = RunRecorder([recorder.event, position])
    config = loaded.config
    pipeline: AvatarPipeline | None = None
    if team is not None and team.size > 1:
        pipeline = AvatarPipeline.from_config(config, recorder=recorder, team=team)
    failed = bugs = 0
    for line in check_lines(lines, config) if many else lines:
        if not isinstance(line, RequestLine):
            report(str(line.error))
            failed += 1
            continue
        pipeline = pipeline or AvatarPipeline.from_config(config, recorder=recorder)
        target = line.target(config)
        if output is not None:
            target = output / target.name if output.is_dir() else output
        try:
            result = pipeline.generate(
                line.request(), target if many else output, resume=resume, index=line.index
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(position.interrupted(target, again)) from None
        except Exception as error:
            known = error if isinstance(error, OmniAvatarError) else translated(error)
            several = team is not None and team.size > 1
            if not many or (known is None and several) or (known and not isinstance(known, OF_ONE_LINE)):
                raise
            failed += 1
            if known is None:
                report_bug(error, report, f"line {line.line}: ")
                bugs, pipeline = bugs + 1, None
            else:
                report(f"line {line.line}: {known}")
            continue
        if quiet:
            say(str(result.output))
    return failed, bugs
