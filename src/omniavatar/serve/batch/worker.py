"""A worker: one engine with loaded models, one item at a time, each under a lease."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from omniavatar.errors import ConfigError, OmniAvatarError, translated
from omniavatar.media.lease import holder_of, try_lease
from omniavatar.serve.batch.destination import Destination, item_lock
from omniavatar.serve.batch.items import (
    Engine,
    EngineFactory,
    Outcome,
    PeerLost,
    Progress,
    Seat,
    Task,
    Verdict,
    WorkerInfo,
    verdict_of,
)


class Worker:
    """Runs in its own process. Call `start` once, then `run` for each task; `progress` at any time.

    on_progress: called with each new progress, from any thread.
    """

    def __init__(
        self,
        factory: EngineFactory,
        seat: Seat,
        destination: Destination,
        folder: str,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._factory, self._seat, self._destination, self._folder = factory, seat, destination, folder
        self._on_progress = on_progress
        self._engine: Engine | None = None
        self._progress = Progress(None, 0, 0)

    def start(self) -> WorkerInfo | Outcome:
        """Make the engine in the driver's working folder; returns an Outcome with the error on failure."""
        began = time.time()
        try:
            self._engine, info = open_engine(self._factory, self._seat, self._folder, self._destination.check)
            return info
        except Exception as error:
            return error_outcome(error, began)

    def run(self, task: Task) -> Outcome:
        """Make the task's video and deliver it."""
        began = time.time()
        try:
            return self._run(task, began)
        except Exception as error:
            return error_outcome(error, began, usable=self._engine is not None and self._engine.intact())
        finally:
            self._progress = Progress(None, 0, 0)

    def progress(self) -> Progress:
        return self._progress

    def _run(self, task: Task, began: float) -> Outcome:
        item, destination = task.item, self._destination
        assert self._engine is not None and item.request is not None
        self._progress = Progress(item.key, 0, 0)
        output = destination.local(item.name)
        path = item_lock(output)
        lease = try_lease(path)
        if lease is None:
            error = f"{item.name}: {holder_of(path)} is making it"
            return Outcome(Verdict.busy, began, time.time(), error=error)
        with lease:
            size = None if task.fresh else destination.delivered(item.name, item.identity)
            made = None
            if size is None:
                destination.refuse_foreign(item.name)
                made = self._engine.run(item.request, output, task.fresh, self._report)
                size = destination.deliver(item.name, item.identity)
        return Outcome(Verdict.done, began, time.time(), made, size)

    def _report(self, window: int, windows: int) -> None:
        self._progress = Progress(self._progress.key, window, windows)
        self._on_progress(self._progress)


class Described(Protocol):
    """What a worker says of its engine."""

    def device(self) -> str: ...


Opened = TypeVar("Opened", bound=Described)


def open_engine(
    factory: Callable[[Seat], Opened], seat: Seat, folder: str, check: Callable[[], None]
) -> tuple[Opened, WorkerInfo]:
    """The engine of a worker, made in the driver's working folder after `check`, and what it runs on."""
    enter_folder(folder)
    check()
    engine = factory(seat)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "") if seat.devices[0] != "cpu" else ""
    return engine, WorkerInfo(socket.gethostname(), os.getpid(), engine.device(), gpus)


def enter_folder(folder: str) -> None:
    """Change to the driver's working folder, so that relative paths mean the same. Raises ConfigError."""
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{folder}: {socket.gethostname()} does not have the folder in which the batch was started; "
            "start it in a folder that all machines share"
        )
    os.chdir(folder)


def error_outcome(error: Exception, began: float, *, usable: bool = False) -> Outcome:
    """The outcome that reports `error`.

    usable: whether the engine can make further items after this error; ignored for bugs and lost peers.
    """
    known = error if isinstance(error, OmniAvatarError) else translated(error)
    if known is not None:
        error = known
        text, verdict = " ".join(str(error).split()), verdict_of(error)
    elif isinstance(error, PeerLost):
        text, verdict, usable = str(error), Verdict.lost, False
    else:
        text, verdict, usable = "".join(traceback.format_exception(error)), Verdict.broken, False
    name = type(error).__name__
    return Outcome(verdict, began, time.time(), error=text, error_class=name, replace=not usable)
