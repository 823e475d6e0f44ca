"""Options and error handling that the commands share."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, TypeAlias

import typer

from omniavatar.errors import BUG, ConfigError, OmniAvatarError, translated
from omniavatar.text import cut, json_text, one_line, printable, quoted

if TYPE_CHECKING:
    from omniavatar.cli.progress import Display
    from omniavatar.cli.progress import LogFormat as LogName
    from omniavatar.config.families import Family
    from omniavatar.engine.recorder import RunRecorder

    DisplayMaker: TypeAlias = Callable[[LogName, bool, IO[str]], Display]

INTERRUPTED = 130
MOST_MINUTES = 10_000.0
"""Of a video to plan for: a week."""
SOME_FAILED = 1
INTERRUPT_NOTE = "interrupted; finished windows are kept, and the same command continues after them"

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        metavar="YAML",
        help="Configuration file, such as configs/inference.yaml, or `pocket` or `pocket-live` for the "
        "packaged models.",
    ),
]
ConfigChoice = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="YAML",
        help="Configuration file, such as configs/inference.yaml, or `pocket` for the packaged model. "
        "Default: the best model whose weights are here, else pocket.",
    ),
]
HpOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hp",
        "-hp",
        "--hparams",
        metavar="KEY=VALUE,...",
        help="Override config values, such as num_steps=25,image_sizes_720=[[400,720]]. May be repeated.",
    ),
]


def whole_number(text: int | str) -> int:
    """The value of an option, read as the configuration reads numbers: `010` and `1_0` are none.

    Raises typer.BadParameter.
    """
    if not re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", str(text)):
        raise typer.BadParameter(f"must be a whole number; got {quoted(str(text))}")
    return int(text)


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class LogFormat(StrEnum):
    """Format of the progress reports on stderr."""

    rich = "rich"
    json = "json"


QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress; print only the output path.")
]
LogOption = Annotated[
    LogFormat, typer.Option("--log-format", help="rich: progress bars; json: one JSON object per event.")
]


def print_error(text: str) -> None:
    """Print the line `error: <text>` to stderr, red on a terminal."""
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error:{reset} {one_line(text)}", file=sys.stderr)


def print_warning(text: str) -> None:
    print(f"warning: {one_line(text)}", file=sys.stderr)


def print_json_error(text: str) -> None:
    """Print the event `error`, as `--log-format json` has it, to stderr."""
    event = {"event": "error", "time": round(time.time(), 3), "text": one_line(text)}
    print(json_text(event, encoding=sys.stderr.encoding), file=sys.stderr)


DEBUG_VARIABLE = "OMNIAVATAR_DEBUG"
"""Environment variable that `--debug` sets, so that processes started later have it too."""


def debugging() -> bool:
    """Whether bugs are reported with their traceback."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def report_bug(error: BaseException, report: Callable[[str], None], where: str = "") -> None:
    """Report an exception that no input should cause, as one line; with `--debug`, its traceback follows.

    where: beginning of the line, such as `line 3: `.
    """
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parents[1])
    ours = [frame for frame in frames if frame.filename.startswith(package)] or frames
    place = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    what = f"{type(error).__name__}: {cut(one_line(str(error)), 300)}{place}"
    remedy = "please report it, with what --debug prints" if not debugging() else "please report it with this"
    report(f"{where}this is a bug: {what}; {remedy}")
    if debugging():
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)


UsageProblem: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""An error in the options of a command."""


@contextmanager
def user_errors(
    report: Callable[[str], None] = print_error,
    on_interrupt: str = "interrupted",
    passes: Callable[[Exception], bool] = lambda error: False,
) -> Iterator[None]:
    """Report any error as one line: an `OmniAvatarError` with its exit code, Ctrl-C with 130, a bug with 70.

    The line for Ctrl-C is the text of the KeyboardInterrupt, or `on_interrupt` if it has none.
    passes: whether to raise an exception unchanged that is neither.
    """
    try:
        yield
    except OmniAvatarError as error:
        report(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interrupt:
        report(str(interrupt) or on_interrupt)
        raise typer.Exit(INTERRUPTED) from None
    except (typer.Exit, typer.Abort, UsageProblem):
        raise
    except Exception as error:
        if passes(error):
            raise
        known = translated(error)
        if known is not None:
            report(str(known))
            raise typer.Exit(known.exit_code) from None
        report_bug(error, report)
        raise typer.Exit(BUG) from None


def require_one_process() -> None:
    """Raise ConfigError if torchrun started several processes (environment variable WORLD_SIZE)."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return
    from omniavatar.parallel.process import Process

    processes = Process.from_environment().world
    if processes != 1:
        raise ConfigError(
            f"torchrun started {processes} processes, but this command runs in one process; "
            "use --nproc_per_node=1, or `generate` to make one video on several GPUs"
        )


@contextmanager
def reporting(
    log_format: LogFormat, quiet: bool, make_display: DisplayMaker | None = None
) -> Iterator[tuple[RunRecorder, Callable[[str], None]]]:
    """A recorder with the chosen display, and a function that reports an error.

    Errors go to stderr as one line, or as the JSON event `error`. Log records of the package are shown as
    messages.

    make_display: called with (log format, quiet, stderr); the default shows one video at a time.
    """
    from omniavatar.cli.progress import make_display as make_video_display
    from omniavatar.engine.events import CommandFailed
    from omniavatar.engine.recorder import RunRecorder

    display = (make_display or make_video_display)(log_format.value, quiet, sys.stderr)
    recorder = RunRecorder([display])

    def report(text: str) -> None:
        if log_format is LogFormat.json:
            recorder.event(CommandFailed(one_line(text)))
        else:
            print_error(text)

    handler = _Forward(recorder)
    logger = logging.getLogger("omniavatar")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with display:
            yield recorder, report
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Forward(logging.Handler):
    """Passes log records of the package to the recorder as messages."""

    def __init__(self, recorder: RunRecorder) -> None:
        super().__init__(logging.INFO)
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        from omniavatar.engine.events import Message

        warning = record.levelno >= logging.WARNING
        self._recorder.event(Message(record.getMessage(), "warning" if warning else "info"))


def leave_at_once(code: object) -> None:
    """End this process with an exit code (None: 0), without the interpreter's shutdown.

    With torch and transformers loaded, that shutdown takes 2 s to free memory which the system frees anyway.
    Exit handlers run and streams are flushed. The function returns, and leaves the exit to the caller, if
    another thread is still running, the code is not a number, or a profiler or tracer is active.
    """
    busy = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    if busy or sys.gettrace() or sys.getprofile() or not isinstance(code, int | None):
        return
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return
    os._exit(code or 0)


def prompt_for(family: Family, prompt: str | None) -> str:
    """The prompt, which a family without text need not have. Raises BadParameter."""
    if prompt is None and family.text:
        raise typer.BadParameter("--prompt is missing; describe the person and the scene")
    return prompt or ""
