"""The workers' side of the job store, on both databases."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from omniavatar.serve.jobs.claims import HOST_ALIVE_S, MOST_FAILURES, MOST_LOSSES
from omniavatar.serve.jobs.records import (
    CANCELLED,
    WORKER_LOST,
    Claim,
    JobError,
    JobProgress,
    JobResult,
    JobSpec,
    JobStatus,
    JobWarning,
    KeyLimits,
)
from omniavatar.serve.jobs.store import JobStore

SPEC = JobSpec("pocket", "a person speaks", "input/a.png", "input/b.wav")
ERROR = JobError("input", "image: is broken", "invalid_request_error", "input_reference")
RESULT = JobResult("output/video.mp4", 1234, 2.5, 4, 1, 1_000_500.0)


def claimed(store: JobStore, worker: str = "worker", lease: float = 60) -> Claim:
    claim = store.claim(worker, ["pocket"], lease)
    assert claim is not None
    return claim


def test_threads_that_claim_at_once_get_each_job_once(database_url: str) -> None:
    with JobStore.open(database_url) as store, ThreadPoolExecutor(8) as pool:
        ids = [store.submit(f"key {index % 3}", SPEC)[0].id for index in range(200)]
        start = threading.Barrier(8)

        def work(number: int) -> list[str]:
            start.wait()
            got = []
            while (claim := store.claim(f"worker {number}", ["pocket"], 60)) is not None:
                got.append(claim.job.id)
            return got

        got = [id for each in pool.map(work, range(8)) for id in each]
        assert sorted(got) == sorted(ids)


CLAIMER = """
import sys
from omniavatar.serve.jobs.store import JobStore
with JobStore.open(sys.argv[1]) as store:
    sys.stdin.readline()
    while (claim := store.claim(sys.argv[2], ["pocket"], 60)) is not None:
        print(claim.job.id, flush=True)
"""


@pytest.mark.slow
def test_processes_that_claim_at_once_get_each_job_once(tmp_path: Path) -> None:
    """On SQLite; connections to PostgreSQL are processes of the server in any case."""
    database_url = f"sqlite:///{tmp_path}/jobs.db"
    with JobStore.open(database_url) as store:
        ids = [store.submit("key", SPEC)[0].id for _ in range(60)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen([sys.executable, "-c", CLAIMER, database_url, f"worker {number}"], **pipes)
        for number in range(2)
    ]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    got = [line for worker in workers for line in worker.communicate(timeout=60)[0].split()]
    assert sorted(got) == sorted(ids)
    assert [worker.returncode for worker in workers] == [0, 0]


def test_keys_take_turns_and_each_key_has_its_own_order(store: JobStore, clock) -> None:
    """A key with many jobs does not hold up the others; in a key, priority comes before age."""
    names = {}
    for name, key, priority in [
        ("a1", "a", 0),
        ("a2", "a", 0),
        ("a3", "a", 9),
        ("a4", "a", 0),
        ("b1", "b", 0),
        ("c1", "c", 0),
        ("b2", "b", 0),
    ]:
        clock.time += 1
        names[store.submit(key, SPEC, priority=priority)[0].id] = name
    order = []
    for _ in range(7):
        clock.time += 1
        claim = claimed(store)
        order.append(names[claim.job.id])
        store.complete(claim, RESULT)
    assert order == ["a3", "b1", "c1", "a1", "b2", "a2", "a4"]


def test_a_key_with_running_jobs_waits_behind_one_without(store: JobStore, clock) -> None:
    for _ in range(3):
        store.submit("busy", SPEC)
    claimed(store)
    store.submit("idle", SPEC)
    assert claimed(store).job.key_id == "idle"


def test_a_key_runs_no_more_jobs_than_its_limit(database_url: str) -> None:
    with JobStore.open(database_url) as store, ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            store.submit("key", SPEC, limits=KeyLimits(running=2))
        claims = list(pool.map(lambda number: store.claim(f"w{number}", ["pocket"], 60), range(6)))
        held = [claim for claim in claims if claim is not None]
        assert len(held) == 2
        store.complete(held[0], RESULT)
        assert store.claim("w", ["pocket"], 60) is not None
        assert store.claim("w", ["pocket"], 60) is None


def test_a_worker_gets_only_models_it_serves(store: JobStore) -> None:
    store.submit("key", SPEC)
    assert store.claim("worker", ["large", "small"], 60) is None
    assert store.claim("worker", [], 60) is None
    assert store.claim("worker", ["large", "pocket"], 60) is not None


def test_a_completed_job_has_its_result(store: JobStore, clock) -> None:
    store.submit("key", SPEC)
    claim = claimed(store)
    clock.time += 5
    assert not store.heartbeat(claim, JobProgress(1, 4, 1, 2, 30.0, 1)).lost
    assert store.get(claim.job.id).progress == 37
    assert store.complete(claim, RESULT)
    job = store.get(claim.job.id)
    assert (job.status, job.progress, job.output, job.size_bytes) == ("completed", 100, RESULT.output, 1234)
    assert (job.started_at, job.completed_at, job.expires_at) == (1_000_000.0, 1_000_005.0, 1_000_500.0)
    assert (job.window, job.windows, job.resumed_windows, job.seconds, job.worker) == (4, 4, 1, 2.5, None)


def test_warnings_of_a_report_and_of_the_result_are_kept(store: JobStore) -> None:
    store.submit("key", SPEC)
    claim, silent = claimed(store), (JobWarning("audio: it is silent", "audio_reference"),)
    store.heartbeat(claim, JobProgress(0, 4, warnings=silent))
    store.heartbeat(claim, JobProgress(1, 4))
    assert store.get(claim.job.id).warnings == silent
    assert store.complete(claim, replace(RESULT, warnings=(*silent, JobWarning("odd"))))
    assert store.get(claim.job.id).warnings == (*silent, JobWarning("odd"))


def test_a_lease_that_runs_out_gives_the_job_to_another_worker(store: JobStore, clock) -> None:
    store.submit("key", SPEC)
    first = claimed(store, "first", lease=10)
    clock.time += 9
    assert store.requeue_expired() == []
    store.heartbeat(first, JobProgress(2, 4))
    clock.time += 9
    assert store.requeue_expired() == []
    clock.time += 2
    assert store.requeue_expired() == [first.job.id]
    assert store.get(first.job.id).status is JobStatus.queued
    second = claimed(store, "second")
    assert second.job.id == first.job.id and second.attempt == first.attempt + 1
    assert second.job.window == 2


@pytest.mark.parametrize("same_name", [False, True])
def test_a_worker_that_was_taken_for_dead_changes_nothing(store: JobStore, clock, same_name: bool) -> None:
    store.submit("key", SPEC)
    stale = claimed(store, "worker", lease=10)
    clock.time += 11
    store.requeue_expired()
    waiting = store.get(stale.job.id)
    assert store.heartbeat(stale, JobProgress(3, 4)).lost
    assert not store.complete(stale, RESULT)
    assert store.get(stale.job.id) == waiting
    claimed(store, "worker" if same_name else "another")
    before = store.get(stale.job.id)
    assert store.heartbeat(stale, JobProgress(3, 4)).lost
    assert not store.complete(stale, RESULT)
    assert not store.fail(stale, ERROR, retry=False)
    assert not store.release(stale)
    assert store.get(stale.job.id) == before


def test_a_worker_that_only_reports_late_keeps_its_job(store: JobStore, clock) -> None:
    store.submit("key", SPEC)
    claim = claimed(store, lease=10)
    clock.time += 100  # the database was away, and nobody asked for expired leases
    assert not store.heartbeat(claim, JobProgress(1, 4)).lost
    assert store.requeue_expired() == []


def test_a_job_whose_workers_keep_dying_fails(store: JobStore, clock) -> None:
    store.submit("key", SPEC)
    for _ in range(MOST_LOSSES):
        assert store.get(store.list().jobs[0].id).status is JobStatus.queued
        claimed(store, lease=1)
        clock.time += 2
        store.requeue_expired()
    job = store.list().jobs[0]
    assert job.status is JobStatus.failed and job.error is not None and job.error.code == WORKER_LOST


def test_a_job_that_gains_a_window_in_each_attempt_goes_on(store: JobStore, clock) -> None:
    store.submit("key", SPEC)
    for window in range(1, 2 * MOST_LOSSES):
        claim = claimed(store, lease=1)
        store.heartbeat(claim, JobProgress(window, 100))
        clock.time += 2
        assert store.requeue_expired() == [claim.job.id]
        assert store.get(claim.job.id).status is JobStatus.queued


def test_a_retry_waits_and_the_last_failure_is_kept(store: JobStore, clock) -> None:
    store.submit("key", SPEC)
    assert store.fail(claimed(store), ERROR, retry=True, pause=30)
    assert store.claim("worker", ["pocket"], 60) is None
    clock.time += 30
    for _ in range(MOST_FAILURES - 1):
        assert store.fail(claimed(store), ERROR, retry=True)
    job = store.list().jobs[0]
    assert (job.status, job.error) == (JobStatus.failed, ERROR)


def test_an_error_of_the_request_is_not_tried_again(store: JobStore) -> None:
    store.submit("key", SPEC)
    store.fail(claimed(store), ERROR, retry=False)
    assert store.list().jobs[0].status is JobStatus.failed
    assert store.claim("worker", ["pocket"], 60) is None


def test_a_released_job_is_next_and_keeps_its_windows(store: JobStore) -> None:
    store.submit("key", SPEC)
    claim = claimed(store)
    store.heartbeat(claim, JobProgress(2, 4, 1, 2))
    assert store.release(claim)
    job = store.get(claim.job.id)
    assert (job.status, job.window, job.step, job.worker) == (JobStatus.queued, 2, 0, None)
    again = claimed(store)
    assert again.job.id == claim.job.id and again.attempt == 2


@pytest.mark.parametrize("end", ["fail", "release", "expire"])
def test_a_cancelled_job_is_not_tried_again(store: JobStore, clock, end: str) -> None:
    store.submit("key", SPEC)
    claim = claimed(store, lease=10)
    store.request_cancel(claim.job.id)
    if end == "expire":
        clock.time += 11
        store.requeue_expired()
    elif end == "fail":
        store.fail(claim, ERROR, retry=True)
    else:
        store.release(claim)
    error = store.get(claim.job.id).error
    assert error is not None and error.code == CANCELLED
    assert Counter(store.counts())["queued"] == 0


def test_workers_are_ready_as_long_as_their_process_reports(store: JobStore, clock) -> None:
    assert store.ready_workers() == 0
    store.note_host("one:1", workers=2, ready=0)
    store.note_host("two:1", workers=3, ready=3)
    store.note_host("one:1", workers=2, ready=1)
    assert store.ready_workers() == 4
    clock.time += HOST_ALIVE_S
    store.note_host("one:1", workers=2, ready=2)
    assert store.ready_workers() == 5
    clock.time += 1
    assert store.ready_workers() == 2, "the other one was killed"
    store.forget_host("one:1")
    assert store.ready_workers() == 0
