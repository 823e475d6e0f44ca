"""`omniavatar live`: an avatar that speaks while someone speaks, to a file, a pipe, a folder or a page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO
from urllib.parse import quote

import typer

from omniavatar.cli.choose import CONFIGS, best_config
from omniavatar.cli.common import (
    ConfigChoice,
    HpOption,
    LogFormat,
    LogOption,
    prompt_for,
    reporting,
    require_one_process,
    user_errors,
)

if TYPE_CHECKING:
    import socket

    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.live.limits import Door, ServerLimits
    from omniavatar.live.outputs import LiveOutput
    from omniavatar.live.session import LiveSession
    from omniavatar.live.sources import SoundSource

MICROPHONE = "microphone"
OF_OUTPUT = ("audio", "rate", "channels", "seconds")
OF_SERVE = ("host", "port", "token", "origin", "sessions", "gone_after")
"""Options that only `--output` and only `--serve` use."""


def live(
    context: typer.Context,
    config: ConfigChoice = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Use the packaged model and portrait; it needs no GPU or download.")
    ] = False,
    image: Annotated[Path | None, typer.Option(help="Portrait (any image file).")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that describes the video.")] = None,
    audio: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-|microphone",
            help="Sound: a file at the pace of real time, raw int16 samples on standard input (-), or the "
            "microphone. Without it the face is silent.",
        ),
    ] = None,
    rate: Annotated[int, typer.Option(help="Samples a second of the sound on standard input.")] = 16000,
    channels: Annotated[int, typer.Option(min=1, max=8, help="Channels of the sound on standard input.")] = 1,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.mp4|FILE.ts|FOLDER/|-",
            help="Video that grows: a file or named pipe, a folder for HLS, or - (MPEG-TS on standard out).",
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="End after this many seconds; default: with the sound.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show a page with the avatar, for the browser's microphone.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address of the page's server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the server; 0: a free one.")] = 8760,
    token: Annotated[
        str | None,
        typer.Option(help="Token that visitors must bring; beyond this machine one is always made."),
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Page of another server that may connect. May be repeated.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Most visitors at a time.")] = 4,
    gone_after: Annotated[
        float,
        typer.Option(
            "--gone-after",
            min=0.2,
            help="End a visit whose network is silent for this many seconds; more for a network that pauses.",
        ),
    ] = 0.8,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise; default: the config's value.")] = None,
    hp: HpOption = None,
    log_format: LogOption = LogFormat.rich,
) -> None:
    """Make video while the sound comes, at the pace of real time.

    A model that is slower than real time buffers, and a message says so. Ctrl-C ends the video properly.
    """
    quiet = False
    with reporting(log_format, quiet) as (recorder, report), user_errors(report):
        require_one_process()
        from omniavatar.assets import pocket
        from omniavatar.config.load import load_config
        from omniavatar.engine.events import Message
        from omniavatar.engine.pipeline import AvatarPipeline
        from omniavatar.errors import InputError
        from omniavatar.live.sound import check_rate
        from omniavatar.plan.preview import with_family

        serve = serve or (demo and output is None)
        check_choices(image, output, serve, demo)
        if serve:
            refuse_unused(context, OF_OUTPUT, "--serve", "give --output for a video")
        else:
            refuse_unused(context, OF_SERVE, "--output", "give --serve for a page")
        if token == "":
            raise typer.BadParameter("--token is empty; give some text, or leave it out")
        if audio == "-":
            check_rate(rate)
            if sys.stdin is None:
                raise InputError("--audio -: standard input is closed; give it a pipe or a file")
        if output is not None:
            check_output(output)
        if audio not in (None, "-", MICROPHONE) and not Path(audio or "").is_file():
            raise InputError(f"--audio {audio}: is not a file; give a sound file, - or {MICROPHONE}")
        if demo:
            config, image, prompt = (
                config or Path("pocket-live"),
                image or pocket.PORTRAIT,
                prompt or pocket.PROMPT,
            )
        if config is None:
            config, reason = best_config(CONFIGS)
            recorder.event(Message(reason))
        loaded = load_config(config, hp or ())
        prompt = prompt_for(with_family(loaded.config).family, prompt)
        for warning in loaded.warnings:
            recorder.event(Message(warning, "warning"))

        def message(text: str, level: str = "info") -> None:
            recorder.event(Message(text, level))  # type: ignore[arg-type]

        with ExitStack() as opened_here:
            listening = None
            if serve:  # before the models are loaded, which takes long
                from omniavatar.live.server import listen

                listening = opened_here.enter_context(listen(host, port))
            pipeline = opened_here.enter_context(AvatarPipeline.from_config(loaded.config, recorder=recorder))
            chosen = {"image": image, "prompt": prompt, "seed": seed}
            if listening is not None:
                from omniavatar.live.limits import ServerLimits

                limits = ServerLimits(sessions=sessions, gone_s=gone_after)
                door = door_of(host, token, origin or [])
                serve_page(pipeline, chosen, listening, host, door, limits, message)
                return
            assert output is not None
            record(pipeline, chosen, audio, (rate, channels), output, seconds, message)


def check_choices(image: Path | None, output: str | None, serve: bool, demo: bool) -> None:
    """Raise BadParameter for options that are missing or exclude each other."""
    if serve and output is not None:
        raise typer.BadParameter("--serve shows a page, --output writes a video; give one of them")
    if not serve and output is None:
        raise typer.BadParameter("give --output for a video, or --serve for a page, or --demo")
    if not demo and image is None:
        raise typer.BadParameter("--image is missing; give a portrait, or --demo")


def refuse_unused(context: typer.Context, names: tuple[str, ...], mode: str, remedy: str) -> None:
    """Raise BadParameter for a given option that a mode does not use."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} has no effect with {mode}; leave it out, or {remedy}"
            )


def door_of(host: str, token: str | None, origins: list[str]) -> Door:
    """Who may enter; beyond loopback always by a token."""
    import secrets

    from omniavatar.live.limits import Door, is_loopback

    loopback = is_loopback(host)
    if token is None and not loopback:
        token = secrets.token_urlsafe(16)
    return Door(loopback, token, tuple(origins))


def record(
    pipeline: AvatarPipeline,
    chosen: dict[str, Any],
    audio: str | None,
    form: tuple[int, int],
    output: str,
    seconds: float | None,
    message: Any,
) -> None:
    """Write one live video until its sound ends, `seconds` have passed, or Ctrl-C."""
    from omniavatar.live.messages import slow_note
    from omniavatar.live.session import LiveSession

    noted, delays = False, []
    with LiveSession(pipeline, **chosen) as session, ExitStack() as closing:
        source = source_of(session, audio, *form)
        if source is not None:
            closing.enter_context(source)
        target = closing.enter_context(opened(output, session))
        try:
            for chunk in session:
                target.add(chunk)
                if chunk.delay is not None:
                    delays.append(chunk.delay)
                if not noted and (note := slow_note(session.stats())):
                    noted = True
                    message(note, "warning")
                if seconds is not None and chunk.time + chunk.seconds >= seconds:
                    break
        except KeyboardInterrupt:
            message("interrupted; the video ends here")
        target.finish()
        if source is not None and source.error is not None:
            raise source.error
        message(summary(session, delays))


def summary(session: LiveSession, delays: list[float]) -> str:
    """What was made, and how long the sound waited for its frames."""
    import statistics

    stats = session.stats()
    text = f"{stats.frames} frames in {stats.blocks} blocks, {stats.dropped} dropped, {stats.stalls} pauses"
    if stats.block_s is not None:
        text += f"; a block of {stats.period_s:.2f} s took {stats.block_s:.2f} s"
    if delays:
        text += (
            f"; sound waited {statistics.median(delays):.2f} s for its frames (at most {max(delays):.2f} s)"
        )
    return text


def source_of(session: LiveSession, audio: str | None, rate: int, channels: int) -> SoundSource | None:
    """The sound of `--audio`."""
    from omniavatar.live.sources import FileSound, MicrophoneSound, PipeSound

    if audio is None:
        return None
    if audio == "-":
        assert sys.stdin is not None
        return PipeSound(session, sys.stdin.buffer, rate, channels)
    if audio == MICROPHONE:
        return MicrophoneSound(session)
    return FileSound(session, Path(audio))


def check_output(output: str) -> None:
    """Raise OutputError for a place that cannot be written, before any model is loaded."""
    from omniavatar.errors import OutputError, TargetError
    from omniavatar.live.outputs import LIST, form_of

    path = Path(output)
    if output == "-":
        return
    if output.endswith("/") or path.is_dir():
        if (path / LIST).exists():
            raise TargetError(f"{path}: has a {LIST} already; delete it, or choose another folder")
        return
    form_of(path)
    if path.is_file():
        raise TargetError(f"{path}: exists already; delete it, or choose another name")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: is not a folder; make it first")


@contextmanager
def opened(output: str, session: LiveSession) -> Iterator[LiveOutput]:
    """Where `--output` writes. Raises OutputError."""
    from omniavatar.live.outputs import GrowingOutput, HlsOutput, form_of
    from omniavatar.media.atomic import translate_os_error
    from omniavatar.media.streamed import StreamWriter

    writer = partial(StreamWriter, session.size, session.exact_fps, session.rate)
    path = Path(output)
    if output == "-":
        # not sys.stdout, which hides that its reader has gone
        with open(1, "wb", buffering=0, closefd=False) as stream:
            yield GrowingOutput(stream, "standard output", writer("mpegts"))
    elif output.endswith("/") or path.is_dir():
        yield HlsOutput(path, writer)
    else:
        form = form_of(path)
        with translate_os_error(path):
            file: BinaryIO = path.open("wb", buffering=0)
        with file:
            yield GrowingOutput(file, output, writer(form))


def serve_page(
    pipeline: AvatarPipeline,
    chosen: dict[str, Any],
    listening: socket.socket,
    host: str,
    door: Door,
    limits: ServerLimits,
    message: Any,
) -> None:
    """Serve the page until Ctrl-C."""
    from omniavatar.live.messages import slow_note
    from omniavatar.live.server import make_app, serve
    from omniavatar.live.session import LiveSession
    from omniavatar.media.temporary import remove_abandoned

    def make(prompt: str | None) -> LiveSession:
        return LiveSession(pipeline, **{**chosen, "prompt": prompt or chosen["prompt"]})

    message("loading the models")
    with make(None) as first:  # problems show now, and the first visitor need not wait
        while first.stats().block_s is None and first.next(60.0) is not None:
            continue
        note = slow_note(first.stats())
    if note is not None:
        message(note, "warning")

    def ready(at: int, stop: object) -> None:
        query = "" if door.token is None else f"?token={quote(door.token, safe='')}"
        shown = f"[{host}]" if ":" in host else host
        message(f"open http://{shown}:{at}/{query} in a browser; Ctrl-C ends the server")

    remove_abandoned()
    serve(make_app(make, door, limits), listening, ready, limits)
