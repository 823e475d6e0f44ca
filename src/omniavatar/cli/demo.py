"""`omniavatar demo`: a first video from the packaged model, of the packaged portrait or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from omniavatar.cli.common import (
    INTERRUPT_NOTE,
    HpOption,
    LogFormat,
    LogOption,
    QuietOption,
    reporting,
    require_one_process,
    user_errors,
)
from omniavatar.cli.generate import check_kinds, make_lines


def demo(
    context: typer.Context,
    image: Annotated[
        Path | None, typer.Option(help="Your portrait, instead of the packaged one. It decides the shape.")
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="Your voice, instead of the packaged one. It decides the length.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that describes the video.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="YAML",
            help="Configuration to run instead of the packaged one, such as configs/inference_1.3B.yaml.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Video to write; default: demo_out/demo.mp4, or a file there with the name of your "
            "portrait or voice.",
        ),
    ] = None,
    hp: HpOption = None,
    quiet: QuietOption = False,
    log_format: LogOption = LogFormat.rich,
) -> None:
    """Make a talking head from the packaged model, portrait and voice, on any machine.

    The packaged model is small and was trained on rendered heads only. Use --config for another model.
    """
    with reporting(log_format, quiet) as (recorder, report), user_errors(report, INTERRUPT_NOTE):
        require_one_process()
        check_kinds(image, audio)
        from omniavatar.assets import SPEECH, pocket
        from omniavatar.cli.position import command_again, command_name
        from omniavatar.config.load import load_config
        from omniavatar.engine.events import Message
        from omniavatar.engine.requests_file import RequestLine

        loaded = load_config(config or pocket.LIVE_CONFIG, hp or ())
        request = RequestLine(0, 0, prompt or pocket.PROMPT, image or pocket.PORTRAIT, audio or SPEECH)
        own = image or audio
        output = output or Path("demo_out") / f"{own.stem if own else 'demo'}.mp4"
        again = command_again(context.obj or ["demo"])
        make_lines(
            loaded, [request], output, None, recorder, report, quiet, many=False, team=None, again=again
        )
        if config is None:
            texts = ["this small model was trained on rendered heads; it does not work on photographs"]
            name = command_name()
            texts.append(f"the video is in {output.resolve()}; for real people, run `{name} download 1.3B`")
            if own is None:
                texts.append(f"next, your own: {name} demo --image me.png --audio me.wav")
            for text in texts:
                recorder.event(Message(text))
