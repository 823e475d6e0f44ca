"""The clients' side of the job store, on both databases."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from omniavatar.errors import ConfigError
from omniavatar.serve.jobs.errors import (
    IdempotencyConflictError,
    JobNotFoundError,
    KeyLimitError,
    QueueFullError,
    StoreError,
)
from omniavatar.serve.jobs.records import (
    CANCELLED,
    Deleted,
    JobProgress,
    JobResult,
    JobSpec,
    JobStatus,
    KeyLimits,
    new_job_id,
)
from omniavatar.serve.jobs.rows import MOST_EVENTS, change, find
from omniavatar.serve.jobs.store import JobStore

SPEC = JobSpec(
    "pocket",
    "a person speaks",
    "input/a.png",
    "input/b.wav",
    (64, 48),
    {"seed": 3, "shift": [1, {"a": None}]},
)


def test_a_job_is_read_as_it_was_submitted(store: JobStore) -> None:
    given = new_job_id()
    made, created = store.submit("key", SPEC, id=given, priority=2)
    assert created and made == store.get(given) == store.get(given, "key")
    assert (made.spec, made.status, made.priority, made.key_id) == (SPEC, JobStatus.queued, 2, "key")
    assert made.created_at == 1_000_000.0 and made.started_at is None


def test_a_job_of_another_key_is_not_found(store: JobStore) -> None:
    job, _ = store.submit("key", SPEC)
    for action in (store.get, store.delete, store.request_cancel):
        with pytest.raises(JobNotFoundError, match="no job has this id"):
            action(job.id, "other")
    with pytest.raises(JobNotFoundError):
        store.list("other", after=job.id)
    assert store.list("other").jobs == ()


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_show_every_job_once_also_those_of_the_same_second(store: JobStore, clock, order) -> None:
    made = []
    for index in range(7):
        clock.time += index % 2
        made.append(store.submit("key", SPEC)[0].id)
    store.submit("other", SPEC)
    seen, after = [], None
    while True:
        page = store.list("key", after=after, limit=3, order=order)
        seen += [job.id for job in page.jobs]
        if not page.has_more:
            break
        after = seen[-1]
    assert sorted(seen) == sorted(made) and len(seen) == 7
    times = [store.get(id).created_at for id in seen]
    assert times == sorted(times, reverse=order == "desc")
    assert len(store.list(limit=20).jobs) == 8
    assert store.list(status=JobStatus.failed).jobs == ()


def test_an_idempotency_key_returns_the_same_job_and_refuses_another_request(store: JobStore) -> None:
    first, created = store.submit("key", SPEC, idempotency_key="once")
    again, created_again = store.submit("key", SPEC, idempotency_key="once")
    assert (created, created_again) == (True, False) and again == first
    assert store.find_idempotent("key", "none", "digest") is None
    with pytest.raises(IdempotencyConflictError, match="another request"):
        store.submit("key", SPEC, idempotency_key="once", request_digest="other")
    other, created = store.submit("other key", SPEC, idempotency_key="once")
    assert created and other.id != first.id
    assert store.unfinished() == 2


def test_many_clients_with_one_idempotency_key_make_one_job(database_url: str) -> None:
    with JobStore.open(database_url) as store, ThreadPoolExecutor(8) as pool:
        start = threading.Barrier(8)

        def submit(_: int) -> tuple[str, bool]:
            start.wait()
            job, created = store.submit("key", SPEC, idempotency_key="once")
            return job.id, created

        made = list(pool.map(submit, range(8)))
        assert len({id for id, _ in made}) == 1 and sum(created for _, created in made) == 1


def test_limits_hold_when_many_submit_at_once(database_url: str) -> None:
    with JobStore.open(database_url) as store, ThreadPoolExecutor(8) as pool:

        def submit(index: int) -> str:
            try:
                store.submit(f"key {index % 2}", SPEC, limits=KeyLimits(unfinished=3), most_unfinished=5)
            except (KeyLimitError, QueueFullError) as error:
                return type(error).__name__
            return "accepted"

        answers = list(pool.map(submit, range(24)))
        assert answers.count("accepted") == 5 and store.unfinished() == 5
        assert {"KeyLimitError", "QueueFullError"} >= set(answers) - {"accepted"}


def test_position_counts_what_comes_before(store: JobStore, clock) -> None:
    ids = []
    for priority in (0, 0, 5, 0):
        clock.time += 1
        ids.append(store.submit("key", SPEC, priority=priority)[0].id)
    assert [store.position(id) for id in ids] == [1, 2, 0, 3]
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None and claim.job.id == ids[2]
    assert [store.position(id) for id in ids] == [0, 1, 0, 2]


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_is_told(store: JobStore) -> None:
    waiting, running = store.submit("key", SPEC)[0], store.submit("key", SPEC, priority=1)[0]
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None and claim.job.id == running.id
    gone = store.request_cancel(waiting.id)
    assert gone.status is JobStatus.failed and gone.error is not None and gone.error.code == CANCELLED
    assert store.request_cancel(waiting.id) == gone
    told = store.request_cancel(running.id)
    assert told.status is JobStatus.in_progress and told.cancel_requested
    assert store.heartbeat(claim, JobProgress()).cancel
    assert store.release(claim)
    assert store.get(running.id).error == gone.error
    assert store.claim("worker", ["pocket"], 60) is None


def test_delete_removes_a_waiting_job_and_cancels_a_running_one(store: JobStore) -> None:
    waiting, running = store.submit("key", SPEC)[0], store.submit("key", SPEC, priority=1)[0]
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None
    assert store.delete(waiting.id, "key") is Deleted.removed
    with pytest.raises(JobNotFoundError):
        store.get(waiting.id)
    assert store.events_after(waiting.id) == ()
    assert store.delete(running.id, "key") is Deleted.cancelling
    store.release(claim)
    assert store.delete(running.id, "key") is Deleted.removed


@pytest.mark.parametrize("ask", ["cancel", "delete"])
def test_what_comes_while_a_video_finishes_waits_for_its_end(database_url: str, ask: str) -> None:
    """Two processes: one has the row of a job that ends, the other is to cancel or to delete it."""
    with JobStore.open(database_url) as worker, JobStore.open(database_url) as client:
        id = worker.submit("key", SPEC)[0].id
        assert worker.claim("worker", ["pocket"], 60) is not None
        with ThreadPoolExecutor(1) as pool:
            with worker.database.writing() as connection:
                row = find(connection, id, lock=True)
                assert row is not None
                ended = {"status": JobStatus.completed, "output": "output/video.mp4", "completed_at": 2.0}
                change(connection, row, 1.0, **ended)
                answer = pool.submit(client.request_cancel if ask == "cancel" else client.delete, id, "key")
                with pytest.raises(TimeoutError):
                    answer.result(0.2)
            if ask == "delete":
                assert answer.result(10) is Deleted.removed
                return
            kept = answer.result(10)
        assert kept == client.get(id) and kept.status is JobStatus.completed
        assert kept.output == "output/video.mp4" and not kept.cancel_requested


def test_a_video_that_finishes_after_it_was_cancelled_is_kept(store: JobStore) -> None:
    id = store.submit("key", SPEC)[0].id
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None and store.request_cancel(id).cancel_requested
    assert store.complete(claim, JobResult("output/video.mp4", 5, 0.8, 1))
    assert store.request_cancel(id) == store.get(id) and store.get(id).status is JobStatus.completed
    assert store.delete(id) is Deleted.removed


def test_events_number_what_happened_and_only_the_last_are_kept(store: JobStore) -> None:
    job, _ = store.submit("key", SPEC)
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None
    for step in range(1, 4):
        store.heartbeat(claim, JobProgress(0, 2, step, 4, 9.0))
    store.heartbeat(claim, JobProgress(0, 2, 3, 4, 8.0))  # nothing new but the estimate
    seen = store.events_after(job.id)
    assert [event.sequence for event in seen] == [1, 2, 3, 4, 5]
    assert [event.data.get("status") for event in seen[:2]] == ["queued", "in_progress"]
    assert seen[-1].kind == "progress" and seen[-1].data["step"] == 3 and seen[-1].data["progress"] == 37
    assert [event.sequence for event in store.events_after(job.id, 3, limit=1)] == [4]
    for step in range(4, MOST_EVENTS + 10):
        store.heartbeat(claim, JobProgress(0, 2, step, 10_000))
    kept = store.events_after(job.id, limit=10_000)
    assert len(kept) == MOST_EVENTS and kept[-1].sequence == kept[0].sequence + MOST_EVENTS - 1


def test_counts_by_status(store: JobStore) -> None:
    for _ in range(3):
        store.submit("key", SPEC)
    store.claim("worker", ["pocket"], 60)
    assert store.counts() == {"queued": 2, "in_progress": 1, "completed": 0, "failed": 0}
    assert store.unfinished("key") == 3 and store.unfinished("other") == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("jobs.db", "database: is not a URL"),
        ("mysql://host/jobs", "mysql is not supported"),
        ("sqlite://", "names no file"),
        ("oddity://x", "oddity is not supported"),
    ],
)
def test_a_url_that_names_no_database_is_one_line(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        JobStore.open(url)
    assert "sqlite:///" in str(error.value)


@pytest.mark.parametrize(
    "url", ["sqlite:////proc/jobs.db", "postgresql://me:secret@/jobs?host=/tmp/no-server-here"]
)
def test_a_database_that_does_not_answer_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(Exception) as error:
        JobStore.open(url)
    assert isinstance(error.value, StoreError) or "cannot write" in str(error.value)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"not a database at all, but long enough" * 100)
    with pytest.raises(StoreError, match=r"does not answer .*not a database"):
        JobStore.open(f"sqlite:///{tmp_path}/jobs.db")
