"""Shows the progress of a run on stderr: progress bars, plain lines, or JSON lines.

Each display is a listener of `RunRecorder` and reads the pipeline's events:
`request_started{index, name, frames, windows, steps, resumed_windows, preview}`,
`window_started{window, windows}`,
`step{window, step, steps, action}`, `window_finished{window, windows, frames_done, seconds}`,
`message{text, level}`, `request_finished{output, seconds, frames}`. On a GPU a step is reported when its work
is queued, a window when it is written. Each JSON line holds one event:
`{"event": name, "time": seconds since 1970, ...fields}`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Literal, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
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

_FIRST_STEP_SHARE = 0.5
"""The share of a window's time that its steps take, before one was measured."""
_ENDING = 0.01
"""The part of the bar that is left when the last window is written, in windows for each window."""
_SPEED_PERIOD_S = 600.0


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
    """One bar for the whole video, with what is done now and the time left.

    Each window is one unit of the bar. Its steps fill the share of the unit that steps took in the window
    before; decoding and writing fill the rest. Prints a line for each window instead where stderr is not a
    terminal.

    clock: gives the time in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            console=console,
            expand=True,
            speed_estimate_period=_SPEED_PERIOD_S,
            disable=not console.is_terminal,
        )
        self._video: TaskID | None = None
        self._windows = 0
        self._step_share = _FIRST_STEP_SHARE
        self._began = self._steps_ended = clock()

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
            case WindowStarted():
                self._began = self._clock()
                self._show(f"window {event.window + 1} of {event.windows}", event.window)
            case StepFinished():
                self._step(event)
            case WindowFinished():
                self._window_finished(event)
            case Message():
                colour = "yellow" if event.level == "warning" else "dim"
                self._console.print(f"[{colour}]{escape(event.text)}[/]", soft_wrap=True)
            case RequestFinished():
                self._finish(event)

    def _start(self, event: RequestStarted) -> None:
        windows, resumed = event.windows, event.resumed_windows
        resuming = f", {resumed} windows already done" if resumed else ""
        self._console.print(
            f"[bold]{escape(event.name)}[/]: {event.frames} frames in {windows} windows{resuming}",
            soft_wrap=True,
        )
        if event.preview:
            text = f"preview, grows with every window: {event.preview}"
            self._console.print(f"[dim]{escape(text)}[/]", soft_wrap=True)
        self._windows = windows
        self._video = self._progress.add_task(
            "loading the models", total=windows * (1 + _ENDING), completed=resumed
        )

    def _step(self, event: StepFinished) -> None:
        number = f"window {event.window + 1} of {self._windows}"
        share = self._step_share * (event.step + 1) / event.steps
        if event.step + 1 < event.steps:
            self._show(f"{number}, step {event.step + 1} of {event.steps}", event.window + share)
        else:
            self._steps_ended = self._clock()
            self._show(f"{number}, decoding", event.window + share)

    def _window_finished(self, event: WindowFinished) -> None:
        now = self._clock()
        if now > self._steps_ended > self._began:
            self._step_share = (self._steps_ended - self._began) / (now - self._began)
        if self._progress.disable:
            number, total = event.window + 1, event.windows
            self._console.print(f"window {number} of {total} done in {event.seconds:.1f} s")
        last = event.window + 1 == event.windows
        self._show("writing the video" if last else "", event.window + 1)

    def _show(self, text: str, done: float) -> None:
        """Show what is done now (empty: as before); the bar never goes back."""
        if self._video is None:
            return
        task = next(each for each in self._progress.tasks if each.id == self._video)
        self._progress.update(
            self._video, description=text or task.description, completed=max(task.completed, done)
        )

    def _finish(self, event: RequestFinished) -> None:
        if self._video is not None:
            self._progress.remove_task(self._video)
        self._video = None
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
