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

    def __call__(self, name: str, fields: Mapping[str, Any]) -> None:
        row = self._rows.setdefault(fields["worker"], _Row()) if "worker" in fields else _Row()
        item = escape(str(fields.get("item", "")))
        match name:
            case "batch_started":
                self._total, self._left = fields["items"], fields["queued"]
                self._ended, self._failed = 0, fields["failed"]
                done = f", {fields['skipped']} already done" if fields["skipped"] else ""
                self._line(f"[bold]{fields['items']} items[/]{done}")
            case "worker_ready":
                self._began = self._began or time.monotonic()
                gpus = f" GPU {fields['gpus']}" if fields["gpus"] else ""
                row.where = f"{fields['host']}{gpus} {fields['device']}"
            case "item_started":
                row.item, row.window, row.windows, row.since = fields["item"], 0, 0, time.monotonic()
            case "item_window":
                row.window, row.windows = fields["window"], fields["windows"]
            case "item_done":
                self._end_item(row)
                row.done += 1
                self._line(
                    f"[green]{escape(fields['video'])}[/]: "
                    f"{fields['frames']} frames in {fields['seconds']:.1f} s"
                )
            case "item_failed":
                self._end_item(row)
                self._failed += 1
                self._line(f"[red]{item} failed[/]: {escape(fields['error'])}")
            case "item_retried":
                self._line(f"[yellow]{item} will be retried[/]: {escape(fields['error'])}")
            case "item_waiting":
                self._line(f"[yellow]{item} waits[/]: {escape(fields['reason'])}")
            case "worker_lost" | "worker_closed":
                row.item = ""
                what = "died" if name == "worker_lost" else "is no longer used"
                self._line(f"[yellow]worker {fields['worker']} {what}[/]: {escape(fields['reason'])}")
            case "message":
                self._line(f"[yellow]{escape(str(fields['text']))}[/]")

    def _end_item(self, row: _Row) -> None:
        row.item = ""
        self._ended += 1

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
    console = Console(file=stderr, highlight=False)
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
