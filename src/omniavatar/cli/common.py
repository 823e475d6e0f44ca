"""What the commands share: options, and how errors become one line and an exit code."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, TypeAlias

import typer

from omniavatar.errors import ConfigError, OmniAvatarError

if TYPE_CHECKING:
    from omniavatar.cli.progress import Display
    from omniavatar.cli.progress import LogFormat as LogName
    from omniavatar.engine.recorder import RunRecorder

    DisplayMaker: TypeAlias = Callable[[LogName, bool, IO[str]], Display]

INTERRUPTED = 130
SOME_FAILED = 1
INTERRUPT_NOTE = "interrupted; finished windows are kept, and the same command continues after them"

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        metavar="YAML",
        help="Configuration file, such as configs/inference.yaml; `pocket`: that of the packaged model.",
    ),
]
HpOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hp",
        "-hp",
        "--hparams",
        metavar="KEY=VALUE,...",
        help="Override config values: num_steps=25,tea_cache_l1_thresh=14e-2,image_sizes_720=[[400,720]]. "
        "May be repeated.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class LogFormat(StrEnum):
    """How progress is reported on stderr."""

    rich = "rich"
    json = "json"


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print the output path only.")]
LogOption = Annotated[
    LogFormat, typer.Option("--log-format", help="rich: progress bars; json: one JSON object an event.")
]


def print_error(text: str) -> None:
    """One line `error: ...` on stderr, red on a terminal."""
    red, reset = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error:{reset} {' '.join(text.split())}", file=sys.stderr)


def print_warning(text: str) -> None:
    print(f"warning: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def user_errors(
    report: Callable[[str], None] = print_error,
    on_interrupt: str = "interrupted",
) -> Iterator[None]:
    """Turn the user's errors into one line and their exit code, Ctrl-C into one line and 130.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except OmniAvatarError as error:
        report(str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        report(on_interrupt)
        raise typer.Exit(INTERRUPTED) from None


def require_one_process() -> None:
    """Raise ConfigError when torchrun started several processes (environment variable WORLD_SIZE)."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"torchrun started {processes} processes, but this command runs in one; use --nproc_per_node=1, "
            "or generate to make one video on several GPUs"
        )


@contextmanager
def reporting(
    log_format: LogFormat, quiet: bool, displays: DisplayMaker | None = None
) -> Iterator[tuple[RunRecorder, Callable[[str], None]]]:
    """A recorder with the chosen display, and where errors go: a line on stderr, or a JSON event `error`.

    displays: makes the display from (log format, quiet, stderr); default: that of one video at a time. Log
    records of the package are shown as messages too.
    """
    from omniavatar.cli.progress import make_display as one_video
    from omniavatar.engine.recorder import RunRecorder

    display = (displays or one_video)(log_format.value, quiet, sys.stderr)
    recorder = RunRecorder([display])

    def report(text: str) -> None:
        if log_format is LogFormat.json:
            recorder.event("error", text=text)
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
    """Shows the package's log records as messages of the run."""

    def __init__(self, recorder: RunRecorder) -> None:
        super().__init__(logging.INFO)
        self._recorder = recorder

    def emit(self, record: logging.LogRecord) -> None:
        level = "warning" if record.levelno >= logging.WARNING else "info"
        self._recorder.event("message", text=record.getMessage(), level=level)


def leave_at_once(code: object) -> None:
    """End this process with an exit code (None: 0) without taking the interpreter apart.

    With torch and transformers loaded that takes 2 s, in which nothing is done that the system does not do
    for a process that is gone. Exit handlers run and streams are flushed. Returns, for an ordinary end, where
    another thread is still at work, the code is no number, or a profiler or tracer wants to report.
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
