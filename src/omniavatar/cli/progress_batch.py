"""Shows the progress of a batch on stderr: a live view of items and workers, plain lines, or JSON lines.

The displays are listeners of the scheduler's events: `batch_started{items, queued, skipped, failed}`,
`worker_ready{worker, host, device, gpus}`, `worker_lost{worker, reason}`, `worker_closed{worker, reason}`,
`item_started{item, worker, attempt}`, `item_window{item, worker, window, windows}`, `item_done{item, video,
worker, frames, resumed_windows, seconds}`, `item_retried{item, attempt, error}`, `item_failed{item, line,
error, attempts}`, `item_waiting{item, reason}`, `message{text, level}`, `batch_finished{...}`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from omniavatar.cli.progress import Display, JsonLines, LogFormat, Quiet
from omniavatar.cli.terminal import SafeConsole
from omniavatar.engine.events import Message
from omniavatar.serve.batch.events import (
    BatchStarted,
    ItemDone,
    ItemFailed,
    ItemRetried,
    ItemStarted,
    ItemWaiting,
    ItemWindow,
    WorkerClosed,
    WorkerLost,
    WorkerReady,
)
from omniavatar.types import Event


@dataclass
class _Row:
    """One worker in the live view."""

    where: str = ""
    item: str = ""
    window: int = 0
    windows: int = 0
    since: float = 0.0
    done: int = 0


class BatchView:
    """Items with the time left, and a row for each worker; a line for each item without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[int, _Row] = {}
        self._total = self._left = self._ended = self._failed = 0
        self._began: float | None = None
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=2,
            transient=True,
            auto_refresh=True,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case BatchStarted():
                self._total, self._left = event.items, event.queued
                self._ended, self._failed = 0, event.failed
                done = f", {event.skipped} already done" if event.skipped else ""
                self._line(f"[bold]{event.items} items[/]{done}")
            case WorkerReady():
                self._began = self._began or time.monotonic()
                gpus = f" GPU {event.gpus}" if event.gpus else ""
                self._row(event.worker).where = f"{event.host}{gpus} {event.device}"
            case ItemStarted():
                row = self._row(event.worker)
                row.item, row.window, row.windows, row.since = event.item, 0, 0, time.monotonic()
            case ItemWindow():
                row = self._row(event.worker)
                row.window, row.windows = event.window, event.windows
            case ItemDone():
                row = self._row(event.worker)
                row.item = ""
                row.done += 1
                self._ended += 1
                self._line(f"[green]{escape(event.video)}[/]: {event.frames} frames in {event.seconds:.1f} s")
            case ItemFailed():
                self._clear(event.item)
                self._ended += 1
                self._failed += 1
                self._line(f"[red]{escape(event.item)} failed[/]: {escape(event.error)}")
            case ItemRetried():
                self._line(f"[yellow]{escape(event.item)} will be retried[/]: {escape(event.error)}")
            case ItemWaiting():
                self._line(f"[yellow]{escape(event.item)} waits[/]: {escape(event.reason)}")
            case WorkerLost() | WorkerClosed():
                self._row(event.worker).item = ""
                what = "died" if isinstance(event, WorkerLost) else "is no longer used"
                self._line(f"[yellow]worker {event.worker} {what}[/]: {escape(event.reason)}")
            case Message():
                self._line(f"[yellow]{escape(event.text)}[/]")

    def _row(self, worker: int) -> _Row:
        return self._rows.setdefault(worker, _Row())

    def _clear(self, item: str) -> None:
        """Show no worker at `item` any more."""
        for row in self._rows.values():
            if row.item == item:
                row.item = ""

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def _render(self) -> RenderableType:
        running = [row for row in self._rows.values() if row.item]
        partly = sum(row.window / row.windows for row in running if row.windows)
        table = Table(box=None, pad_edge=False)
        for column in ("worker", "item", "window", "elapsed", "done"):
            table.add_column(column)
        now = time.monotonic()
        for row in self._rows.values():
            window = f"{row.window} of {row.windows}" if row.windows else ""
            spent = _clock(now - row.since) if row.item else ""
            table.add_row(escape(row.where), escape(row.item[:48]), window, spent, str(row.done))
        progress = self._ended + partly
        elapsed = now - self._began if self._began is not None else 0.0
        left = _clock(elapsed / progress * (self._left - progress)) if progress else "?"
        text = Text(f"{self._ended} of {self._left} items, {self._failed} failed, {left} left")
        return Group(text, ProgressBar(max(1, self._left), progress, width=60), table)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def make_batch_display(log_format: LogFormat, quiet: bool, stderr: IO[str]) -> Display:
    """The display for a log format. quiet: warnings only; JSON lines stay complete."""
    if log_format == "json":
        return JsonLines(stderr)
    console = SafeConsole(stderr)
    return Quiet(console) if quiet else BatchView(console)


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print workers, failures and totals."""
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "host", "device", "GPU", "done", "failed", "starts", "in use", "video s"):
        table.add_column(column, justify="left" if column in ("host", "device") else "right")
    for row in summary["workers"]:
        use = "" if row["utilization"] is None else f"{100 * row['utilization']:.1f} %"
        texts = (row["worker"], row["host"] or "", row["device"] or "", row["gpus"] or "", row["done"])
        table.add_row(
            *(str(text) for text in texts),
            str(row["failed"]),
            str(row["starts"]),
            use,
            f"{row['video_seconds']:.1f}",
        )
    if summary["workers"]:
        console.print(table)
    for failure in summary["failures"]:
        last = failure["error"].strip().splitlines()[-1]
        console.print(
            f"failed: {failure['item']} (line {failure['line']}): {last}", soft_wrap=True, markup=False
        )
    counted = ("done", "skipped", "failed", "remaining")
    parts = [f"{summary[name]} {name}" for name in counted if summary[name]]
    text = f"{summary['items']} items: {', '.join(parts)} in {summary['wall_seconds']:.1f} s"
    if summary["real_time_factor"] is not None:
        text += (
            f"; {summary['video_seconds']:.1f} s of video, real-time factor {summary['real_time_factor']:.3g}"
            f"; pauses between items {100 * (summary['pause_share'] or 0.0):.2f} %"
        )
    console.print(text, soft_wrap=True)
