"""Events of a batch, as values. `item` is an item's key, `worker` the number of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omniavatar.types import Event


@dataclass(frozen=True)
class BatchStarted(Event, kind="batch_started"):
    """Counts of items: all of them, and those that are queued, done already, and unreadable."""

    items: int
    queued: int
    skipped: int
    failed: int


@dataclass(frozen=True)
class BatchFinished(Event, kind="batch_finished"):
    """The batch has ended. summary: the content of `summary.json`."""

    summary: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return dict(self.summary)


@dataclass(frozen=True)
class WorkerReady(Event, kind="worker_ready"):
    """A worker has loaded its models."""

    worker: int
    host: str
    device: str
    gpus: str


@dataclass(frozen=True)
class WorkerLost(Event, kind="worker_lost"):
    """The process of a worker died."""

    worker: int
    reason: str


@dataclass(frozen=True)
class WorkerClosed(Event, kind="worker_closed"):
    """A worker is no longer used."""

    worker: int
    reason: str


@dataclass(frozen=True)
class ItemStarted(Event, kind="item_started"):
    """A worker works on an item; attempt counts from 1."""

    item: str
    worker: int
    attempt: int


@dataclass(frozen=True)
class ItemWindow(Event, kind="item_window"):
    """`window` windows of an item are finished."""

    item: str
    worker: int
    window: int
    windows: int


@dataclass(frozen=True)
class ItemDone(Event, kind="item_done"):
    """A video is at the destination. video: its name; seconds: spent on it by this batch."""

    item: str
    video: str
    worker: int
    frames: int
    resumed_windows: int
    seconds: float


@dataclass(frozen=True)
class ItemWaiting(Event, kind="item_waiting"):
    """Another process works on the item; it is tried again later."""

    item: str
    reason: str


@dataclass(frozen=True)
class ItemRetried(Event, kind="item_retried"):
    """The item failed and is queued again."""

    item: str
    attempt: int
    error: str


@dataclass(frozen=True)
class ItemFailed(Event, kind="item_failed"):
    """The item failed for good. line: of the input file; attempts: 0 where it could not be read."""

    item: str
    line: int
    error: str
    attempts: int
