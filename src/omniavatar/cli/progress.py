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
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

LogFormat = Literal["rich", "json"]


class Display(Protocol):
    """A listener that may own the terminal while it is entered."""

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None: ...

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

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        record = {"event": name, "time": round(time.time(), 3), **fields}
        self._stream.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        self._stream.flush()


class Quiet(_Plain):
    """Shows warnings only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        if name == "message" and fields.get("level") == "warning":
            self._console.print(f"[yellow]warning:[/] {escape(str(fields['text']))}", soft_wrap=True)


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

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        match name:
            case "request_started":
                self._start(fields)
            case "window_started" if self._window is not None:
                number, total = fields["window"] + 1, fields["windows"]
                self._progress.reset(self._window, description=f"  window {number} of {total}")
            case "step" if self._window is not None and self._video is not None:
                self._progress.update(self._window, completed=fields["step"] + 1, total=fields["steps"])
                done = fields["window"] * fields["steps"] + fields["step"] + 1
                self._progress.update(self._video, completed=done)
            case "window_finished" if self._progress.disable:
                number, total = fields["window"] + 1, fields["windows"]
                self._console.print(f"window {number} of {total} done in {fields['seconds']:.1f} s")
            case "message":
                colour = "yellow" if fields.get("level") == "warning" else "dim"
                self._console.print(f"[{colour}]{escape(str(fields['text']))}[/]", soft_wrap=True)
            case "request_finished":
                self._finish(fields)

    def _start(self, fields: Mapping[str, Any]) -> None:
        windows, steps, resumed = fields["windows"], fields["steps"], fields.get("resumed_windows", 0)
        resuming = f", {resumed} windows already done" if resumed else ""
        title = escape(str(fields["name"]))
        self._console.print(
            f"[bold]{title}[/]: {fields['frames']} frames in {windows} windows{resuming}", soft_wrap=True
        )
        self._video = self._progress.add_task(
            "video", total=windows * steps, completed=resumed * steps, unit="steps"
        )
        self._window = self._progress.add_task("  window", total=steps, unit="steps")

    def _finish(self, fields: Mapping[str, Any]) -> None:
        for task in (self._video, self._window):
            if task is not None:
                self._progress.remove_task(task)
        self._video = self._window = None
        output = escape(str(fields["output"]))
        self._console.print(
            f"[green]{output}[/]: {fields['frames']} frames in {fields['seconds']:.1f} s", soft_wrap=True
        )


def make_display(log_format: LogFormat, quiet: bool, stderr: IO[str]) -> Display:
    """The display for a log format. quiet: warnings only; JSON lines stay complete."""
    if log_format == "json":
        return JsonLines(stderr)
    console = Console(file=stderr, highlight=False)
    return Quiet(console) if quiet else Bars(console)
