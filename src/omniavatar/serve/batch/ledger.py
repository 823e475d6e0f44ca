"""The record of a batch: the state of every item, and the work of every worker slot."""

from __future__ import annotations

from dataclasses import dataclass, field

from omniavatar.errors import OmniAvatarError
from omniavatar.serve.batch.items import Task, WorkerInfo
from omniavatar.serve.batch.run_folder import ItemState


@dataclass
class Slot:
    """One worker slot and the work of its workers so far. Times are in seconds.

    info: the worker now, None while none is ready; `known` keeps the last one.
    present: time with a ready worker. busy: time spent on items.
    gaps, gap_seconds: pauses between two items while others were queued.
    closed: why the slot is no longer used.
    """

    number: int
    info: WorkerInfo | None = None
    known: WorkerInfo | None = None
    task: Task | None = None
    given_at: float = 0.0
    starts: int = 0
    false_starts: int = 0
    closed: str = ""
    ready_since: float = 0.0
    present: float = 0.0
    busy: float = 0.0
    done: int = 0
    failed: int = 0
    lost: int = 0
    video_seconds: float = 0.0
    last_ended: float | None = None
    gaps: int = 0
    gap_seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"worker {self.number}" if self.info is None else f"{self.info.host}:{self.info.pid}"


@dataclass
class Ledger:
    """The record of one batch run."""

    states: dict[str, ItemState]
    skipped: set[str] = field(default_factory=set)
    slots: list[Slot] = field(default_factory=list)
    wall: float = 0.0
    error: OmniAvatarError | None = None
    interrupted: bool = False
