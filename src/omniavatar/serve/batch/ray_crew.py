"""Workers as Ray actors; the only file that imports Ray.

Without an address, Ray is started on this machine and stopped at the end (`local_ray`). With an address, the
driver joins a running cluster; Ray then places the workers and handles the nodes. Ray does not restart a dead
worker but reports it: the scheduler knows which item it had.
Source: Ray's documentation of actors, fault tolerance and fractional GPUs.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from omniavatar.errors import ConfigError, ResourceError
from omniavatar.serve.batch.crew import Answered, Lost, News, Started
from omniavatar.serve.batch.group import GroupWorker
from omniavatar.serve.batch.items import (
    EngineFactory,
    GroupFactory,
    Outcome,
    Progress,
    Seat,
    Stop,
    Verdict,
)
from omniavatar.serve.batch.worker import Worker

if TYPE_CHECKING:
    from omniavatar.serve.batch.local_ray import LocalRay

Kind = type[Started] | type[Answered]

_CONNECT_S = 10
_WATCH_S = 1.0
"""Ray's own processes are looked at this often."""
_JOIN_ATTEMPTS = 3
_CLIENT_SERVER_DIED = ("Starting Ray client server failed", "psutil.")
"""Text in join errors that are worth a retry. The head forks one server per driver, and gRPC can kill the
fork at high load; the head then reports a failed start, or a psutil error about a dead or zombie process."""


@dataclass(frozen=True)
class Seats:
    """The hardware of all workers of a batch.

    gpus: GPUs of this machine, as in `CUDA_VISIBLE_DEVICES`; () for the CPU or with `address`.
    gpus_per_worker: 0 for the CPU, below 1 if workers share a GPU.
    cpus_per_worker: threads of a worker.
    address: a running cluster (`ray://host:10001`, `host:6379`, `auto`); None starts Ray on this machine.
    devices: devices per worker; each has its own process if there are several.
    """

    gpus: tuple[str, ...]
    gpus_per_worker: float
    cpus_per_worker: int
    address: str | None = None
    devices: int = 1

    @property
    def seat(self) -> Seat:
        """The devices of one worker, as its process sees them."""
        if self.gpus_per_worker == 0:
            return Seat(("cpu",) * self.devices)
        return Seat(tuple(f"cuda:{index}" for index in range(self.devices)))


class RayCrew:
    """A `Crew` of Ray actors; call `close` at the end.

    workers: number of workers; None for as many as the cluster can run now.
    factory: makes the engines; a GroupFactory if a worker has several devices.
    destination: handed on to the workers.
    kinds: classes of the workers with one device and with several.

    Raises ResourceError if Ray is missing or unreachable, ConfigError if the cluster cannot run a worker,
    CrewLost if a process of Ray ended while it started.
    """

    ends_along = False

    def __init__(
        self,
        seats: Seats,
        workers: int | None,
        factory: EngineFactory | GroupFactory,
        destination: Any,
        kinds: tuple[type, type] = (Worker, GroupWorker),
    ) -> None:
        try:
            if "ray" not in sys.modules:  # Ray reads its settings at import, its processes at their start
                for name, value in ray_environment(seats.address).items():
                    os.environ.setdefault(name, value)
            import ray

            from omniavatar.serve.batch.local_ray import LocalRay
        except ImportError as error:
            raise ResourceError(
                f"omniavatar batch: the package {error.name} is missing; pip install 'omniavatar[batch]'"
            ) from None
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._ray, self._seats = ray, seats
        self._local: LocalRay | None = None
        self._watched = 0.0
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, Any] = {}
        self._heard: SimpleQueue[tuple[int, Any, Kind, Future[Any]]] = SimpleQueue()
        self._progress_calls: dict[int, tuple[Any, Future[Any]]] = {}
        self._progress: dict[int, Progress] = {}
        try:
            if seats.address is None:
                self._local = LocalRay(ray, seats.gpus, (workers or 1) * seats.cpus_per_worker)
            else:
                join_cluster(ray, seats.address)
            self._workers = workers or self._cluster_capacity()
        except BaseException:
            self.close()
            raise
        grouped = seats.devices > 1
        self._actor = ray.remote(kinds[grouped])
        packed = ray.cloudpickle.dumps(factory) if grouped else factory
        self._arguments = (packed, seats.seat, destination, os.getcwd())

    def _cluster_capacity(self) -> int:
        """Number of workers the cluster can run now; a worker never spans nodes."""
        seats = self._seats
        on_gpu = seats.gpus_per_worker > 0
        kind, share = ("GPU", seats.gpus_per_worker) if on_gpu else ("CPU", seats.cpus_per_worker)
        node_resources = [node["Resources"].get(kind, 0) for node in self._ray.nodes() if node["Alive"]]
        workers = workers_fitting(node_resources, share)
        if not workers:
            raise ConfigError(
                f"--ray-address {seats.address}: a worker needs {share:g} {kind}s on one node, but the "
                f"largest node has {max(node_resources, default=0):g}; "
                "give --workers if the cluster grows on demand"
            )
        return workers

    @property
    def workers(self) -> int:
        return self._workers

    def hire(self, slot: int) -> None:
        seats = self._seats
        actor = self._actor.options(
            num_cpus=seats.cpus_per_worker, num_gpus=seats.gpus_per_worker, max_restarts=0, max_concurrency=3
        ).remote(*self._arguments)
        self._actors[slot] = actor
        self._call(slot, actor.start.remote(), Started)

    def give(self, slot: int, task: Any) -> None:
        self._progress.pop(slot, None)
        self._call(slot, self._actors[slot].run.remote(task), Answered)

    def stop(self, slot: int, how: Stop) -> None:
        """Have a busy worker end its task early; its answer follows."""
        self._actors[slot].stop.remote(how)

    def _call(self, slot: int, ref: Any, kind: Kind) -> None:
        """Put the answer into one queue, so that `wait` costs the same for any number of workers."""
        self._calls[slot] = ref
        ref.future().add_done_callback(lambda answer: self._heard.put((slot, ref, kind, answer)))

    def dismiss(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        self._calls.pop(slot, None)
        self._progress_calls.pop(slot, None)
        self._progress.pop(slot, None)
        if actor is None or (self._local is not None and self._local.has_ended()):
            return  # a call to a Ray that ended would end this process
        with suppress(Exception):  # the actor may be dead already, or the cluster unreachable
            self._ray.kill(actor, no_restart=True)

    def wait(self, seconds: float) -> Sequence[News]:
        self._watch()
        news: list[News] = []
        with suppress(Empty):
            while True:
                slot, ref, kind, answer = self._heard.get(timeout=0 if news else seconds)
                if self._calls.get(slot) is ref:  # skips answers of dismissed workers
                    del self._calls[slot]
                    news.append(self._news(slot, kind, answer))
        return news

    def _watch(self) -> None:
        """Raise CrewLost if a service of the Ray on this machine ended."""
        now = time.monotonic()
        if self._local is None or now - self._watched < _WATCH_S:
            return
        self._watched = now
        self._local.check()

    def _news(self, slot: int, kind: Kind, call: Future[Any]) -> News:
        try:
            answer = call.result()
        except self._ray.exceptions.RayError as error:
            return Lost(slot, _one_line(error))
        if isinstance(answer, Outcome) and answer.verdict is Verdict.lost:
            return Lost(slot, answer.error)
        return kind(slot, answer)

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        for slot, (_, answer) in list(self._progress_calls.items()):
            if answer.done():
                del self._progress_calls[slot]
                with suppress(self._ray.exceptions.RayError):  # `wait` reports the worker's death
                    self._progress[slot] = answer.result()
        for slot in slots:
            if slot not in self._progress_calls and slot in self._calls:
                ref = self._actors[slot].progress.remote()
                self._progress_calls[slot] = (ref, ref.future())
        return {slot: self._progress[slot] for slot in slots if slot in self._progress}

    def close(self) -> None:
        """Kill every worker, and stop Ray if this object started it."""
        for slot in list(self._actors):
            self.dismiss(slot)
        if self._local is not None:
            self._local.close()
        else:
            self._ray.shutdown()


def join_cluster(ray: Any, address: str) -> None:
    """Connect to a running cluster. Raises ResourceError.

    ray: the module.
    """
    _check_listening(address)
    for attempts_left in reversed(range(_JOIN_ATTEMPTS)):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except ImportError as error:
            raise ResourceError(
                f"--ray-address {address}: {_one_line(error)}; pip install 'omniavatar[batch]'"
            ) from None
        except Exception as error:
            if attempts_left and any(sign in str(error) for sign in _CLIENT_SERVER_DIED):
                continue
            raise ResourceError(
                f"--ray-address {address}: cannot join the cluster ({_one_line(error)}); check that it "
                "runs, that it has the same versions of Ray and Python, and that its token is in "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from error


def workers_fitting(node_resources: Sequence[float], share: float) -> int:
    """Number of workers that fit on the nodes, each taking `share` of one node's resources."""
    return sum(int(each / share + 1e-6) for each in node_resources)


def ray_environment(address: str | None) -> dict[str, str]:
    """Environment variables for Ray: quiet, no reports, and a token for its ports private to this batch."""
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": "^",  # keeps Ray's own lines off the driver's stdout
    }
    if address is not None:
        has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        has_token = has_token or Path(os.path.expanduser("~/.ray/auth_token")).is_file()
        return {**quiet, "RAY_AUTH_MODE": "token"} if has_token else quiet  # Ray 2.60 needs the mode set
    return {
        **quiet,
        "RAY_enable_metrics_collection": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # orphans of a killed driver wait so long for it
        "RAY_task_events_report_interval_ms": "0",  # task lists are never read
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _check_listening(address: str) -> None:
    """Raise ResourceError if nothing listens at the address: Ray would wait for minutes, or without end."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # `auto`, or an address without a port
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"--ray-address {address}: no cluster answers ({error}); start one with `ray start --head`"
        ) from None


def _one_line(error: Exception) -> str:
    """One line of a long Ray error: how the process ended, or else the last line, which has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = next((line for line in lines if "exit" in line.lower() and "detail" in line.lower()), None)
    return (detail or (lines[-1] if lines else type(error).__name__))[:300]
