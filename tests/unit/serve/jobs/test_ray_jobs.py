"""Workers of the queue on Ray, and groups of processes that make each video together."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job_driver import RULES
from job_stub import STEPS, noted
from omniavatar.serve.batch.items import Outcome, Seat, Stop, Verdict, WorkerInfo
from omniavatar.serve.batch.ray_crew import RayCrew, Seats
from omniavatar.serve.jobs.engines import JobGroupWorker
from omniavatar.serve.jobs.records import CANCELLED, JobStatus
from omniavatar.serve.jobs.worker import JobTask, JobWorker
from omniavatar.serve.jobs.workers import WorkerRules, Workers
from queue_place import WAIT_S, Place

pytestmark = pytest.mark.slow
TWO = Seat(("cpu", "cpu"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.store.close()


def test_jobs_on_ray_survive_the_death_of_a_worker_and_are_cancelled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same queue, with the batch's actors: window counts, a kill, a cancel and a drain."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    place.hold(1)
    workers = Workers(
        place.store,
        place.files,
        lambda: RayCrew(Seats((), 0, 1), 1, place.engines, place.files, kinds=(JobWorker, JobGroupWorker)),
        ["pocket"],
        WorkerRules(**RULES),
    )
    first, second = place.submit(), place.submit()
    workers.start()
    try:
        place.until(first, lambda job: job.window == 1)
        os.kill(int(noted(place.notes, "begin")[0][2]), signal.SIGKILL)
        place.until(first, lambda job: job.attempt == 2)
        place.go()
        assert place.finished(first).resumed_windows == 1
        place.hold()
        place.until(second, lambda job: job.status is JobStatus.in_progress and job.windows > 0)
        place.store.request_cancel(second)
        job = place.until(second, lambda job: job.status is JobStatus.failed)
        assert job.error is not None and job.error.code == CANCELLED
        third = place.submit()
        place.until(third, lambda job: job.status is JobStatus.in_progress and job.windows > 0)
        workers.drain()
        assert workers.join(WAIT_S)
        assert place.store.get(third).status is JobStatus.queued
        assert [words[1] for words in noted(place.notes, "window") if words[0] == third] == ["0"]
    finally:
        workers.stop()
        assert workers.join(WAIT_S)
    place.made_once(first)


def test_a_group_makes_jobs_of_several_models_and_stops(place: Place) -> None:
    worker = JobGroupWorker(pickle.dumps(place.engines), TWO, place.files, str(Path.cwd()))
    try:
        assert isinstance(worker.start(), WorkerInfo)
        ids = [place.submit(model=model) for model in ("pocket", "pocket", "other")]
        for id in ids:
            outcome = worker.run(JobTask(id, place.store.get(id).spec))
            assert outcome.verdict is Verdict.done and outcome.size == place.video.stat().st_size, outcome
            place.made_once(id)
        assert noted(place.notes, "group") == [["pocket"], ["other"]]

        place.hold(1)
        id = place.submit(model="other")
        answers: list[Outcome] = []
        task = JobTask(id, place.store.get(id).spec)
        making = threading.Thread(target=lambda: answers.append(worker.run(task)))
        making.start()
        end = time.monotonic() + WAIT_S
        while worker.progress().window < 1:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert worker.progress().steps == STEPS
        worker.stop(Stop.after_window)
        making.join(WAIT_S)
        assert answers[0].error_class == "StoppedError"
        place.go()
        outcome = worker.run(task)
        assert outcome.made is not None and outcome.made.resumed_windows == 2
        place.made_once(id)
    finally:
        worker.close()
