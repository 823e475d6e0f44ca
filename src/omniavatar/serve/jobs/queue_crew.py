"""The crew of a batch whose videos the workers of a server make: each item becomes a job of the one queue.

A job has the idempotency key of its item. So a batch that was interrupted finds its jobs again, and jobs go
on while no batch waits for them. The scheduler, the states on disk and the summary are those of any batch.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omniavatar.config.change import effective_sampling
from omniavatar.config.schema import SamplingConfig
from omniavatar.engine.requests_file import SAMPLING_KEYS
from omniavatar.media.atomic import atomic_path, atomic_write_json, beside, translate_os_error
from omniavatar.serve.batch.crew import Answered, News, Started
from omniavatar.serve.batch.destination import Destination
from omniavatar.serve.batch.items import ERRORS, Made, Outcome, Progress, Task, Verdict, WorkerInfo
from omniavatar.serve.batch.worker import error_outcome
from omniavatar.serve.jobs.errors import JobNotFoundError, StoreError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import (
    LOCAL_KEY,
    SIDECAR,
    VIDEO,
    JobRecord,
    JobSpec,
    JobStatus,
    Json,
    new_job_id,
)
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.worker import code_of

_log = logging.getLogger("omniavatar.serve")

AT_ONCE = 64
"""Most jobs of a batch in the queue, so that a long batch leaves room in it."""
LOOK_S = 0.5


@dataclass(frozen=True)
class QueueOrder:
    """How a batch uses a queue. model: one of the server's. priority: of its jobs.

    provenance: whether the server must sign the videos; otherwise it signs if it signs all.
    """

    model: str
    sampling: SamplingConfig
    priority: int = 0
    provenance: bool = False


class QueueCrew:
    """A `Crew` of places in the queue; the store is closed at the end."""

    def __init__(
        self, store: JobStore, files: JobFiles, order: QueueOrder, destination: Destination, workers: int
    ) -> None:
        self._store, self._files, self._order, self._destination = store, files, order, destination
        self._workers = min(workers, AT_ONCE)
        self._news: deque[News] = deque()
        self._waiting: dict[int, tuple[Task, str, float]] = {}
        self._seen: dict[int, JobRecord] = {}
        self._store_away = False

    @property
    def workers(self) -> int:
        return self._workers

    def hire(self, slot: int) -> None:
        info = WorkerInfo(socket.gethostname(), os.getpid(), f"queue {self._store.database.name}", "")
        self._news.append(Started(slot, info))

    def give(self, slot: int, task: Task) -> None:
        began = time.time()
        try:
            self._waiting[slot] = (task, self._submit(task), began)
        except Exception as error:
            self._news.append(Answered(slot, error_outcome(error, began, usable=True)))

    def dismiss(self, slot: int) -> None:
        """Wait no longer; the job stays in the queue."""
        self._waiting.pop(slot, None)

    def wait(self, seconds: float) -> Sequence[News]:
        end = time.monotonic() + seconds
        while True:
            for slot in list(self._waiting):
                self._look(slot)
            left = end - time.monotonic()
            if self._news or left <= 0:
                news, self._news = list(self._news), deque()
                return news
            time.sleep(min(left, LOOK_S))

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        found = {}
        for slot in slots:
            waiting, job = self._waiting.get(slot), self._seen.get(slot)
            if waiting is not None and job is not None:
                found[slot] = Progress(waiting[0].key, job.window, job.windows, job.step, job.steps)
        return found

    def close(self) -> None:
        self._store.close()

    def _submit(self, task: Task) -> str:
        """The id of the item's job: the one of an earlier batch, or a new one."""
        item, order = task.item, self._order
        assert item.request is not None
        request, id = item.request, new_job_id()
        key = f"batch {secrets.token_hex(8)}" if task.fresh else f"batch {item.identity[:32]} {item.key}"
        names: dict[str, str] = {}
        given = {"image": request.image, "audio": request.audio}
        for kind, path in given.items():
            if path is not None:
                assert isinstance(path, str | Path)
                names[kind] = f"input/{kind}{_suffix(Path(path))}"
        sampling = effective_sampling(order.sampling, request.sampling)
        values = sampling.model_dump(mode="json")
        settings: dict[str, Json] = {name: values[name] for name in SAMPLING_KEYS if values[name] is not None}
        spec = JobSpec(
            order.model,
            item.prompt,
            names["image"],
            names.get("audio"),
            settings=settings,
            provenance=order.provenance,
        )
        digest = item.identity[:64]
        found = self._store.find_idempotent(LOCAL_KEY, key, digest)
        if found is not None and found.status is JobStatus.failed:
            self._store.delete(found.id)
            self._files.delete(found.id)
        elif found is not None:
            return found.id
        for kind, name in names.items():
            with Path(str(given[kind])).open("rb") as stream:
                self._files.put(id, name, stream)
        job, created = self._store.submit(
            LOCAL_KEY,
            spec,
            id=id,
            priority=order.priority,
            idempotency_key=key,
            request_digest=digest,
        )
        if not created:
            self._files.delete(id)
        return job.id

    def _look(self, slot: int) -> None:
        task, id, began = self._waiting[slot]
        try:
            job = self._seen[slot] = self._store.get(id)
            self._store_away = False
            if job.status is JobStatus.completed:
                outcome = self._collected(task, job, began)
            elif job.status is JobStatus.failed:
                outcome = _failed(job, began)
            else:
                return
        except StoreError as error:  # the jobs go on, and so does the waiting
            if not self._store_away:
                _log.warning("%s; waiting for it", error)
            self._store_away = True
            return
        except JobNotFoundError:
            text = f"{id}: the job was deleted from the queue; give the same command again"
            outcome = Outcome(Verdict.failed, began, time.time(), error=text, error_class="OutputError")
        except Exception as error:
            outcome = error_outcome(error, began, usable=True)
        del self._waiting[slot]
        self._news.append(Answered(slot, outcome))

    def _collected(self, task: Task, job: JobRecord, began: float) -> Outcome:
        """Copy the finished video and its sidecar to the destination."""
        name, destination = task.item.name, self._destination
        output = destination.local(name)
        sidecar = beside(output, "", output.stem, ".json")
        destination.refuse_foreign(name)
        with self._files.open(job.id, SIDECAR) as stream:
            values = {**json.loads(stream.read()), "output": output.name}
        with translate_os_error(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        with self._files.open(job.id, VIDEO) as source, atomic_path(output) as temporary:
            target = temporary.open("wb")
            with target:
                shutil.copyfileobj(source, target, 2**20)
        atomic_write_json(sidecar, values)
        size = destination.deliver(name, task.item.identity)
        made = Made(values["frames"], job.windows, job.resumed_windows, job.seconds or 0.0)
        return Outcome(Verdict.done, began, time.time(), made, size)


def _failed(job: JobRecord, began: float) -> Outcome:
    """The outcome of a job that failed. The queue has tried it again already."""
    assert job.error is not None
    classes: dict[str, str] = {code_of(kind.__name__): kind.__name__ for kind in ERRORS}
    name = classes.get(job.error.code, "OmniAvatarError")
    return Outcome(Verdict.failed, began, time.time(), error=job.error.message, error_class=name)


def _suffix(path: Path) -> str:
    """The ending of a file's name, if it is a plain one."""
    ending = path.suffix.lower()
    return ending if ending[1:].isalnum() and ending.isascii() and len(ending) < 10 else ""


def queue_crew(
    url: str, place: str, order: QueueOrder, destination: Destination, work: Path, items: int
) -> Callable[[], QueueCrew]:
    """Opens the crew of a batch of `items` videos, as `run_batch` wants it. Raises nothing yet.

    url: of the server's database. place: of its files. work: local folder, used if `place` is a URL.
    """

    def open_crew() -> QueueCrew:
        files = JobFiles(place, work / "queue" if "://" in place else None)
        files.check()
        return QueueCrew(JobStore.open(url), files, order, destination, items)

    return open_crew
