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

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from omniavatar.cli.course import Course
from omniavatar.cli.terminal import SafeConsole
from omniavatar.engine.events import (
    Message,
    RequestFinished,
    RequestStarted,
    WindowFinished,
)
from omniavatar.text import json_text
from omniavatar.types import Event

LogFormat = Literal["rich", "json"]

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
        self._stream.write(json_text(record, encoding=getattr(self._stream, "encoding", None)) + "\n")
        self._stream.flush()


class Quiet(_Plain):
    """Shows warnings only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        if isinstance(event, Message) and event.level == "warning":
            self._console.print(f"[yellow]warning:[/] {escape(event.text)}", soft_wrap=True)


class _Ticking(Progress):
    """Progress bars that call `tick` before each drawing."""

    def __init__(self, tick: Callable[[], None], *columns: ProgressColumn, **options: Any) -> None:
        self._tick = tick
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        self._tick()
        yield from super().get_renderables()


class Bars:
    """One bar for the whole video, with what is done now and the time left.

    Prints a line for each window instead where stderr is not a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._course: Course | None = None
        self._video: TaskID | None = None
        self._progress = _Ticking(
            self._draw,
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=_SPEED_PERIOD_S,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        if self._course is not None:
            self._course(event)
            self._progress.refresh()
        match event:
            case RequestStarted():
                self._start(event)
            case WindowFinished() if self._progress.disable:
                number, total = event.window + 1, event.windows
                self._console.print(f"window {number} of {total} done in {event.seconds:.1f} s")
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
        self._course = Course(event)
        self._video = self._progress.add_task(self._course.text, total=self._course.total, completed=resumed)

    def _draw(self) -> None:
        course, video = self._course, self._video
        if course is not None and video is not None:
            with suppress(KeyError):  # the thread that draws comes here too, perhaps while the video ends
                self._progress.update(video, description=course.text, completed=course.done())

    def _finish(self, event: RequestFinished) -> None:
        if self._video is not None:
            self._progress.remove_task(self._video)
            self._progress.refresh()
        self._course = self._video = None
        self._console.print(
            f"[green]{escape(event.output)}[/]: {event.frames} frames in {event.seconds:.1f} s",
            soft_wrap=True,
        )


def make_display(log_format: LogFormat, quiet: bool, stderr: IO[str]) -> Display:
    """The display for a log format. quiet: warnings only; JSON lines stay complete."""
    if log_format == "json":
        return JsonLines(stderr)
    console = SafeConsole(stderr)
    return Quiet(console) if quiet else Bars(console)
