"""What flows through a batch: items, what a worker makes of them, and the engine a worker owns.

A batch is a queue of items and some workers. A worker owns a place (a CPU thread, a GPU, a group of GPUs) and
one warm engine on it, takes one item at a time and answers with an `Outcome`, never with an exception: what
an error means for the item, the worker and the batch is decided where it is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from omniavatar.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    OmniAvatarError,
    OutputError,
    ResourceError,
    ResumeError,
)
from omniavatar.types import AvatarRequest

ERRORS: tuple[type[OmniAvatarError], ...] = (
    ConfigError,
    InputError,
    CheckpointError,
    OutputError,
    ResumeError,
    ResourceError,
)


@dataclass(frozen=True)
class Item:
    """One video to make.

    key: unique in the batch, also the name of its state file. name: file name of the video. identity: text
    that changes whenever the finished video would no longer be what is asked. line: line of the input file.
    problem: why it cannot be made at all (`request` is None then).
    """

    key: str
    name: str
    line: int
    prompt: str
    identity: str
    request: AvatarRequest | None
    problem: str | None = None


@dataclass(frozen=True)
class Task:
    """An item given to a worker; `fresh`: start over even if windows of it are done."""

    item: Item
    fresh: bool


@dataclass(frozen=True)
class Place:
    """Where an engine runs: torch devices as the worker's process sees them, the first one leading."""

    devices: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """One of the processes that make videos together, each on a device of its own; rank 0 leads.

    store: file through which they find each other.
    """

    place: Place
    rank: int
    store: str

    @property
    def device(self) -> str:
        return self.place.devices[self.rank]


class PeerLost(Exception):
    """An exchange failed because another process of the group is gone or silent."""


@dataclass(frozen=True)
class Made:
    """What an engine made of one request."""

    frames: int
    windows: int
    resumed_windows: int
    video_seconds: float


class Engine(Protocol):
    """Makes one video after the other with models loaded once."""

    def run(
        self, request: AvatarRequest, output: Path, fresh: bool, on_window: Callable[[int, int], None]
    ) -> Made:
        """Write the request's video to `output`, whole or not at all, with its `.json` beside it.

        Work that was cut inside the video is continued unless `fresh`; a finished video of the same request
        is left as it is. `on_window(done, windows)` tells the progress. Raises OmniAvatarError.
        """
        ...

    def device(self) -> str:
        """Name of the device, for people."""
        ...

    def intact(self) -> bool:
        """Whether it can go on with the next request after one that failed."""
        ...


EngineFactory = Callable[[Place], Engine]


class GroupFactory(Protocol):
    """Makes an engine of several processes, of which each calls one of these."""

    def lead(self, member: Member) -> Engine:
        """Rank 0: join the others; what it makes, all make. Raises OmniAvatarError, PeerLost."""
        ...

    def follow(self, member: Member) -> None:
        """The others: join, and work along until this process is ended. Raises as `lead`."""
        ...


class Verdict(StrEnum):
    """What an answer means."""

    done = "done"
    busy = "busy"  # another process is at this item now
    failed = "failed"  # this item can't be made, whoever tries
    retry = "retry"  # may go well later: disk, memory, network
    fatal = "fatal"  # every item would fail like this
    broken = "broken"  # a bug
    lost = "lost"  # one of the worker's processes died


@dataclass(frozen=True)
class Outcome:
    """A worker's answer. began, ended: seconds since 1970 on the worker's clock. size: bytes delivered.

    replace: the worker can make no further item.
    """

    verdict: Verdict
    began: float
    ended: float
    made: Made | None = None
    size: int = 0
    error: str = ""
    error_class: str = ""
    replace: bool = False


@dataclass(frozen=True)
class WorkerInfo:
    """Who a worker is: `gpus` as in CUDA_VISIBLE_DEVICES, empty on a CPU."""

    host: str
    pid: int
    device: str
    gpus: str


@dataclass(frozen=True)
class Progress:
    """Windows done of the item a worker is at; key None: at nothing."""

    key: str | None
    window: int
    windows: int


def verdict_of(error: OmniAvatarError) -> Verdict:
    """What an error of one item means for the item and for the others."""
    if isinstance(error, ConfigError | CheckpointError):
        return Verdict.fatal
    return Verdict.retry if isinstance(error, OutputError | ResourceError) else Verdict.failed


def as_error(outcome: Outcome) -> OmniAvatarError:
    """The error a worker met, as one of ours again."""
    found = {kind.__name__: kind for kind in ERRORS}.get(outcome.error_class, OmniAvatarError)
    return found(outcome.error)
