"""A worker: one warm engine, one item at a time, under a lease."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from omniavatar.errors import ConfigError, OmniAvatarError
from omniavatar.serve.batch.destination import Destination
from omniavatar.serve.batch.items import (
    Engine,
    EngineFactory,
    Outcome,
    PeerLost,
    Place,
    Progress,
    Task,
    Verdict,
    WorkerInfo,
    verdict_of,
)
from omniavatar.serve.batch.lease import holder_of, try_lease


class Worker:
    """Runs in a process of its own. `start` once, then `run` one after the other; `progress` at any time.

    tell: called with each progress, from any thread.
    """

    def __init__(
        self,
        factory: EngineFactory,
        place: Place,
        destination: Destination,
        folder: str,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._factory, self._place, self._destination, self._folder = factory, place, destination, folder
        self._tell = tell
        self._engine: Engine | None = None
        self._progress = Progress(None, 0, 0)

    def start(self) -> WorkerInfo | Outcome:
        """Make the engine in the driver's working folder; an Outcome tells why that is not possible."""
        began = time.time()
        try:
            enter(self._folder)
            self._destination.check()
            self._engine = self._factory(self._place)
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "") if self._place.devices[0] != "cpu" else ""
            return WorkerInfo(socket.gethostname(), os.getpid(), self._engine.device(), gpus)
        except Exception as error:
            return problem(error, began)

    def run(self, task: Task) -> Outcome:
        """Make the task's video and deliver it."""
        began = time.time()
        try:
            return self._run(task, began)
        except Exception as error:
            return problem(error, began, usable=self._engine is not None and self._engine.intact())
        finally:
            self._progress = Progress(None, 0, 0)

    def progress(self) -> Progress:
        return self._progress

    def _run(self, task: Task, began: float) -> Outcome:
        item, destination = task.item, self._destination
        assert self._engine is not None and item.request is not None
        self._progress = Progress(item.key, 0, 0)
        output = destination.local(item.name)
        path = output.with_name(f".{item.name}.lock")
        lease = try_lease(path)
        if lease is None:
            return Outcome(Verdict.busy, began, time.time(), error=f"{item.name}: {holder_of(path)} is at it")
        with lease:
            size = None if task.fresh else destination.delivered(item.name, item.identity)
            made = None
            if size is None:
                made = self._engine.run(item.request, output, task.fresh, self._note)
                size = destination.deliver(item.name, item.identity)
        return Outcome(Verdict.done, began, time.time(), made, size)

    def _note(self, window: int, windows: int) -> None:
        self._progress = Progress(self._progress.key, window, windows)
        self._tell(self._progress)


def enter(folder: str) -> None:
    """Work in the driver's working folder, so that relative paths mean the same. Raises ConfigError."""
    if not Path(folder).is_dir():
        raise ConfigError(
            f"{folder}: {socket.gethostname()} does not have the folder the batch was started in; "
            "start it in one that all machines share"
        )
    os.chdir(folder)


def problem(error: Exception, began: float, *, usable: bool = False) -> Outcome:
    """What the error means; usable: whether the engine can go on after an error that is no bug."""
    if isinstance(error, OmniAvatarError):
        text, verdict = " ".join(str(error).split()), verdict_of(error)
    elif isinstance(error, PeerLost):
        text, verdict, usable = str(error), Verdict.lost, False
    else:
        text, verdict, usable = "".join(traceback.format_exception(error)), Verdict.broken, False
    name = type(error).__name__
    return Outcome(verdict, began, time.time(), error=text, error_class=name, replace=not usable)
