"""Shows the progress of a run on stderr: progress bars, plain lines, or JSON lines.

Each display is a listener of `RunRecorder` and reads the pipeline's events:
`request_started{index, name, frames, windows, steps, resumed_windows}`, `window_started{window, windows}`,
`step{window, step, steps, action}`, `window_finished{window, windows, frames_done, seconds}`,
`message{text, level}`, `request_finished{output, seconds, frames}`. On a GPU a step is reported when its work
is queued, a window when it is written. Each JSON line holds one event:
`{"event": name, "time": seconds since 1970, ...fields}`.
"""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import IO, Literal, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from omniavatar.engine.events import (
    Message,
    RequestFinished,
    RequestStarted,
    StepFinished,
    WindowFinished,
    WindowStarted,
)
from omniavatar.types import Event

LogFormat = Literal["rich", "json"]


class Display(Protocol):
    """A listener that may own the terminal while it is entered."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Plain:
    """A display that has nothing to open or close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class JsonLines(_Plain):
    """One line of JSON for each event, flushed at once."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __call__(self, event: Event) -> None:
        record = {"event": event.kind, "time": round(time.time(), 3), **event.as_dict()}
        self._stream.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        self._stream.flush()


class Quiet(_Plain):
    """Shows warnings only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message) and event.level == "warning":
            self._console.print(f"[yellow]warning:[/] {escape(event.text)}", soft_wrap=True)


class Bars:
    """Two bars: steps of the whole request with the time left, and steps of the current window.

    Prints a line for each window instead where stderr is not a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            console=console,
            disable=not console.is_terminal,
        )
        self._video: TaskID | None = None
        self._window: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case RequestStarted():
                self._start(event)
            case WindowStarted() if self._window is not None:
                title = f"  window {event.window + 1} of {event.windows}"
                self._progress.reset(self._window, description=title)
            case StepFinished() if self._window is not None and self._video is not None:
                self._progress.update(self._window, completed=event.step + 1, total=event.steps)
                done = event.window * event.steps + event.step + 1
                self._progress.update(self._video, completed=done)
            case WindowFinished() if self._progress.disable:
                number, total = event.window + 1, event.windows
                self._console.print(f"window {number} of {total} done in {event.seconds:.1f} s")
            case Message():
                colour = "yellow" if event.level == "warning" else "dim"
                self._console.print(f"[{colour}]{escape(event.text)}[/]", soft_wrap=True)
            case RequestFinished():
                self._finish(event)

    def _start(self, event: RequestStarted) -> None:
        windows, steps, resumed = event.windows, event.steps, event.resumed_windows
        resuming = f", {resumed} windows already done" if resumed else ""
        self._console.print(
            f"[bold]{escape(event.name)}[/]: {event.frames} frames in {windows} windows{resuming}",
            soft_wrap=True,
        )
        self._video = self._progress.add_task(
            "video", total=windows * steps, completed=resumed * steps, unit="steps"
        )
        self._window = self._progress.add_task("  window", total=steps, unit="steps")

    def _finish(self, event: RequestFinished) -> None:
        for task in (self._video, self._window):
            if task is not None:
                self._progress.remove_task(task)
        self._video = self._window = None
        self._console.print(
            f"[green]{escape(event.output)}[/]: {event.frames} frames in {event.seconds:.1f} s",
            soft_wrap=True,
        )


def make_display(log_format: LogFormat, quiet: bool, stderr: IO[str]) -> Display:
    """The display for a log format. quiet: warnings only; JSON lines stay complete."""
    if log_format == "json":
        return JsonLines(stderr)
    console = Console(file=stderr, highlight=False)
    return Quiet(console) if quiet else Bars(console)
