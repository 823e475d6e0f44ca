"""Workers as Ray actors; the only file that imports Ray.

On one machine Ray is started here and stopped at the end: no dashboard, no usage report, a token of its own,
a temporary folder of its own with a short name (Unix sockets allow about 100 letters). With an address a
running cluster is joined; where its workers run, what happens when a node dies, and how many nodes there are
is Ray's business. A worker that dies is not restarted by Ray but reported, since the scheduler knows which
item it had.
Source: Ray's actor, fault tolerance and fractional GPU documentation.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from omniavatar.errors import ConfigError, ResourceError
from omniavatar.serve.batch.crew import Answered, Lost, News, Started
from omniavatar.serve.batch.destination import Destination
from omniavatar.serve.batch.group import GroupWorker
from omniavatar.serve.batch.items import EngineFactory, GroupFactory, Outcome, Place, Progress, Task, Verdict
from omniavatar.serve.batch.worker import Worker

Kind = type[Started] | type[Answered]

_OBJECT_STORE_BYTES = 100 * 2**20
_SHORT = 40
_CONNECT_S = 10
_JOINS = 3
_CLIENT_SERVER_DIED = ("Starting Ray client server failed", "psutil.")
"""In errors of joining (the latter begins the name of one): the head forks a server a driver, and gRPC can
kill the fork at high load; the head then finds it gone, or a zombie."""


@dataclass(frozen=True)
class Seats:
    """What workers run on.

    gpus: GPUs of this machine by number as `CUDA_VISIBLE_DEVICES` has them, () for the CPU or with `address`.
    gpus_per_worker: 0 for the CPU, below 1 to share a GPU. cpus_per_worker: threads of a worker.
    address: of a running cluster (`ray://host:10001`, `host:6379`, `auto`); None starts Ray here.
    devices: of a worker; each has a process of its own if there are several.
    """

    gpus: tuple[str, ...]
    gpus_per_worker: float
    cpus_per_worker: int
    address: str | None = None
    devices: int = 1

    @property
    def place(self) -> Place:
        if self.gpus_per_worker == 0:
            return Place(("cpu",) * self.devices)
        return Place(tuple(f"cuda:{index}" for index in range(self.devices)))


class RayCrew:
    """A `Crew` of Ray actors; `close` it at the end.

    workers: how many it is for; None: as many as the cluster has room for. factory: a GroupFactory for seats
    of several devices. Raises ResourceError when Ray is missing or cannot be reached, ConfigError when the
    cluster has no room.
    """

    def __init__(
        self,
        seats: Seats,
        workers: int | None,
        factory: EngineFactory | GroupFactory,
        destination: Destination,
    ) -> None:
        try:
            if "ray" not in sys.modules:  # it reads them when it is imported, its processes when they start
                for name, value in _environment(seats.address).items():
                    os.environ.setdefault(name, value)
            import ray
        except ImportError:
            raise ResourceError(
                "omniavatar batch: the package ray is missing; pip install 'omniavatar[batch]'"
            ) from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._ray, self._seats = ray, seats
        self._folder: str | None = None
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, Any] = {}
        self._heard: SimpleQueue[tuple[int, Any, Kind, Future[Any]]] = SimpleQueue()
        self._asked: dict[int, tuple[Any, Future[Any]]] = {}
        self._progress: dict[int, Progress] = {}
        try:
            if seats.address is None:
                self._start_here(workers or 1)
            else:
                self._join(seats.address)
            self._workers = workers or self._fitting()
        except BaseException:
            self.close()
            raise
        grouped = seats.devices > 1
        self._actor = ray.remote(GroupWorker if grouped else Worker)
        packed = ray.cloudpickle.dumps(factory) if grouped else factory
        self._arguments = (packed, seats.place, destination, os.getcwd())

    def _start_here(self, workers: int) -> None:
        seats = self._seats
        folder = tempfile.gettempdir()
        self._folder = tempfile.mkdtemp(prefix="oa-", dir=folder if len(folder) < _SHORT else "/tmp")
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seats.gpus)
        try:
            self._ray.init(
                num_cpus=workers * seats.cpus_per_worker,
                num_gpus=len(seats.gpus),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=self._folder,
            )
        except Exception as error:
            raise ResourceError(
                f"Ray does not start on this machine ({_one_line(error)}); see `ray stop`"
            ) from error
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before

    def _join(self, address: str) -> None:
        _check_listening(address)
        for left in reversed(range(_JOINS)):
            try:
                self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
                return
            except ImportError as error:
                raise ResourceError(
                    f"--ray-address {address}: {_one_line(error)}; pip install 'omniavatar[batch]'"
                ) from None
            except Exception as error:
                if left and any(sign in str(error) for sign in _CLIENT_SERVER_DIED):
                    continue
                raise ResourceError(
                    f"--ray-address {address}: cannot join ({_one_line(error)}); check that a cluster runs "
                    "there, the same Ray and Python, its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
                ) from error

    def _fitting(self) -> int:
        """Workers for which the cluster has room now; one is always on one node."""
        seats = self._seats
        on_gpu = seats.gpus_per_worker > 0
        kind, share = ("GPU", seats.gpus_per_worker) if on_gpu else ("CPU", seats.cpus_per_worker)
        there = [node["Resources"].get(kind, 0) for node in self._ray.nodes() if node["Alive"]]
        workers = workers_fitting(there, share)
        if not workers:
            raise ConfigError(
                f"--ray-address {seats.address}: has {max(there, default=0):g} {kind}s on a node now, "
                f"{share:g} are needed; give --workers for a cluster that grows on demand"
            )
        return workers

    @property
    def workers(self) -> int:
        return self._workers

    def hire(self, slot: int) -> None:
        seats = self._seats
        actor = self._actor.options(
            num_cpus=seats.cpus_per_worker, num_gpus=seats.gpus_per_worker, max_restarts=0, max_concurrency=2
        ).remote(*self._arguments)
        self._actors[slot] = actor
        self._call(slot, actor.start.remote(), Started)

    def give(self, slot: int, task: Task) -> None:
        self._progress.pop(slot, None)
        self._call(slot, self._actors[slot].run.remote(task), Answered)

    def _call(self, slot: int, ref: Any, kind: Kind) -> None:
        """Have the answer put into the queue: waiting there costs nothing, however many workers there are."""
        self._calls[slot] = ref
        ref.future().add_done_callback(lambda answer: self._heard.put((slot, ref, kind, answer)))

    def dismiss(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        self._calls.pop(slot, None)
        self._asked.pop(slot, None)
        self._progress.pop(slot, None)
        if actor is not None:
            with suppress(Exception):  # it may be gone already, or the connection to the cluster
                self._ray.kill(actor, no_restart=True)

    def wait(self, seconds: float) -> Sequence[News]:
        news: list[News] = []
        with suppress(Empty):
            while True:
                slot, ref, kind, answer = self._heard.get(timeout=0 if news else seconds)
                if self._calls.get(slot) is ref:  # not of a worker that was dismissed
                    del self._calls[slot]
                    news.append(self._news(slot, kind, answer))
        return news

    def _news(self, slot: int, kind: Kind, call: Future[Any]) -> News:
        try:
            answer = call.result()
        except self._ray.exceptions.RayError as error:
            return Lost(slot, _one_line(error))
        if isinstance(answer, Outcome) and answer.verdict is Verdict.lost:
            return Lost(slot, answer.error)
        return kind(slot, answer)

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        for slot, (_, answer) in list(self._asked.items()):
            if answer.done():
                del self._asked[slot]
                with suppress(self._ray.exceptions.RayError):  # its death is reported by `wait`
                    self._progress[slot] = answer.result()
        for slot in slots:
            if slot not in self._asked and slot in self._calls:
                ref = self._actors[slot].progress.remote()
                self._asked[slot] = (ref, ref.future())
        return {slot: self._progress[slot] for slot in slots if slot in self._progress}

    def close(self) -> None:
        """End every worker, and Ray where it was started here."""
        for slot in list(self._actors):
            self.dismiss(slot)
        self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def workers_fitting(there: Sequence[float], share: float) -> int:
    """Workers of `share` each for which nodes with that much `there` have room."""
    return sum(int(each / share + 1e-6) for each in there)


def _environment(address: str | None) -> dict[str, str]:
    """Settings for Ray: quiet, no reports, and a token for its ports that only this batch knows."""
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # no line of Ray's own on the driver's stdout
    }
    if address is not None:
        kept = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        kept = kept or (Path.home() / ".ray" / "auth_token").is_file()
        return {**quiet, "RAY_AUTH_MODE": "token"} if kept else quiet  # Ray 2.60 does not do so by itself
    return {
        **quiet,
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",  # nobody asks this Ray for lists of tasks
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _check_listening(address: str) -> None:
    """Raise ResourceError if nothing answers there: Ray itself would wait for minutes, or for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # `auto`, or a session of Ray Client without a port
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"--ray-address {address}: nothing answers there ({error}); start one with `ray start --head`"
        ) from None


def _one_line(error: Exception) -> str:
    """What Ray's many lines come to: how the process ended, or the last line, which is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "exit" in line.lower() and "detail" in line.lower()), None)
    return (detail or (lines[-1] if lines else type(error).__name__))[:300]
