"""The values of a batch: items, outcomes, and the engine interface.

A batch is a queue of items and some workers. A worker owns a seat (CPU threads, a GPU, or a group of GPUs)
and one engine with loaded models. It takes one item at a time and answers with an `Outcome`, never with an
exception: the code that raises an error decides what it means for the item, the worker and the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from omniavatar.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    InputError,
    NumbersError,
    OmniAvatarError,
    OutputError,
    ResourceError,
    ResumeError,
    TargetError,
)
from omniavatar.types import AvatarRequest

ERRORS: tuple[type[OmniAvatarError], ...] = (
    ConfigError,
    InputError,
    CheckpointError,
    OutputError,
    ResumeError,
    ResourceError,
    NumbersError,
    TargetError,
    BusyError,
)
WORKER_DIED = "WorkerDied"
"""`error_class` of an item whose worker died."""


@dataclass(frozen=True)
class Item:
    """One video to make.

    key: unique in the batch; names the state file.
    name: file name of the video.
    line: line number in the input file.
    identity: hash of everything the finished video depends on.
    problem: why the video cannot be made; `request` is then None.
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
    """An item given to a worker.

    fresh: start over, even if some of its windows are done.
    """

    item: Item
    fresh: bool

    @property
    def key(self) -> str:
        return self.item.key


@dataclass(frozen=True)
class Seat:
    """Where an engine runs.

    devices: torch devices, numbered as the worker's process sees them; the first one leads.
    """

    devices: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """One of the processes that make videos together, one per device; rank 0 leads.

    store: file through which the processes find each other.
    """

    seat: Seat
    rank: int
    store: str

    @property
    def device(self) -> str:
        return self.seat.devices[self.rank]


class Stop(StrEnum):
    """How a busy worker of a queue ends its task early; its finished windows are kept."""

    now = "now"  # at the next step
    after_window = "after_window"


class PeerLost(Exception):
    """An exchange failed because another process of the group died or does not answer."""


@dataclass(frozen=True)
class Made:
    """The result of an engine for one request."""

    frames: int
    windows: int
    resumed_windows: int
    video_seconds: float


class Engine(Protocol):
    """Makes one video after another with the same loaded models."""

    def run(
        self, request: AvatarRequest, output: Path, fresh: bool, on_window: Callable[[int, int], None]
    ) -> Made:
        """Write the complete video to `output`, and its `.json` beside it. Raises OmniAvatarError.

        An interrupted video is continued unless `fresh`. A finished video of the same request stays as it
        is. `on_window(done, windows)` reports the progress.
        """
        ...

    def device(self) -> str:
        """Name of the device, for display."""
        ...

    def intact(self) -> bool:
        """Whether the engine can make the next request after one that failed."""
        ...


EngineFactory = Callable[[Seat], Engine]


class GroupFactory(Protocol):
    """Makes an engine that spans several processes; each process calls one of these methods."""

    def lead(self, member: Member) -> Engine:
        """For rank 0: connect to the others and return the engine. Raises OmniAvatarError, PeerLost."""
        ...

    def follow(self, member: Member) -> None:
        """For the other ranks: connect, and follow orders until this process is killed. Raises as `lead`."""
        ...


class Verdict(StrEnum):
    """What the scheduler does with an outcome."""

    done = "done"
    busy = "busy"  # another process makes this item now
    failed = "failed"  # this item can never be made
    retry = "retry"  # may succeed later: disk, memory, network
    fatal = "fatal"  # every item would fail in the same way
    broken = "broken"  # a bug
    lost = "lost"  # one of the worker's processes died


@dataclass(frozen=True)
class Outcome:
    """The answer of a worker to one task.

    began, ended: seconds since 1970 on the worker's clock.
    size: bytes of the delivered video.
    replace: the worker cannot make further items and must be replaced.
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
    """Identity of a worker process; `gpus` as in CUDA_VISIBLE_DEVICES, empty on the CPU."""

    host: str
    pid: int
    device: str
    gpus: str


@dataclass(frozen=True)
class InputWarning:
    """What is odd about an input, and what to do. about: `image`, `audio` or `prompt`."""

    about: str
    text: str


@dataclass(frozen=True)
class Progress:
    """Finished windows of the item a worker makes now; `key` is None if it is idle.

    step: of `steps` of the window in work. resumed: windows that an earlier attempt finished.
    warnings: about the inputs.
    """

    key: str | None
    window: int
    windows: int
    step: int = 0
    steps: int = 0
    eta_seconds: float | None = None
    resumed: int = 0
    warnings: tuple[InputWarning, ...] = ()


def verdict_of(error: OmniAvatarError) -> Verdict:
    """The verdict on an error raised by one item."""
    if isinstance(error, ConfigError | CheckpointError):
        return Verdict.fatal
    if isinstance(error, TargetError):
        return Verdict.busy if isinstance(error, BusyError) else Verdict.failed
    return Verdict.retry if isinstance(error, OutputError | ResourceError) else Verdict.failed


def is_bug(error_class: str) -> bool:
    """Whether an item's error is a bug of this package, by the name of its class."""
    known = {OmniAvatarError.__name__, *(kind.__name__ for kind in ERRORS), WORKER_DIED, ""}
    return error_class not in known


def as_error(outcome: Outcome) -> OmniAvatarError:
    """The exception that a worker's outcome describes."""
    found = {kind.__name__: kind for kind in ERRORS}.get(outcome.error_class, OmniAvatarError)
    return found(outcome.error)


def last_line(error: str) -> str:
    """The last line of an error, which in a traceback holds the message."""
    return error.strip().splitlines()[-1] if error.strip() else "no reason given"
