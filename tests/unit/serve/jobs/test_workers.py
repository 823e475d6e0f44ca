"""Workers of the queue in processes of their own, with a fake engine: kills, drains, cancels, outages."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from job_driver import RULES
from job_stub import ODD, noted
from omniavatar.serve.batch.crew import CrewLost, News
from omniavatar.serve.jobs.claims import MOST_LOSSES
from omniavatar.serve.jobs.presence import boot_id
from omniavatar.serve.jobs.process_crew import NICENESS, ProcessCrew
from omniavatar.serve.jobs.records import (
    CANCELLED,
    THUMBNAIL,
    VIDEO,
    WORKER_LOST,
    JobRecord,
    JobStatus,
    JobWarning,
)
from omniavatar.serve.jobs.workers import WorkerRules, Workers
from postgres import PostgresServer, programs
from queue_place import WAIT_S, Place

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.store.close()


def test_a_job_is_made_delivered_and_reported(place: Place) -> None:
    with place.workers(keep=100.0) as (workers, _):
        id = place.submit()
        job = place.finished(id)
        end = time.monotonic() + WAIT_S
        while place.ended != [id]:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert workers.status().ready == 1 and not workers.status().errors
        assert place.store.ready_workers() == 1
    assert place.store.ready_workers() == 0, "they have ended"
    assert (job.output, job.windows, job.seconds, job.attempt) == (VIDEO, 4, 1.44, 1)
    assert job.size_bytes == place.video.stat().st_size and job.expires_at is not None
    assert 99 < job.expires_at - (job.completed_at or 0) < 101
    assert place.files.local(id, THUMBNAIL).read_bytes()[8:12] == b"WEBP"
    assert place.files.partial(id) is None and not place.files.work(id).parent.exists()
    events = place.store.events_after(id, limit=1000)
    assert [event.data["status"] for event in events if event.kind == "status"] == [
        "queued",
        "in_progress",
        "completed",
    ]
    place.made_once(id)


def test_a_killed_worker_goes_on_after_its_last_window(place: Place) -> None:
    """Its warnings about the inputs are known at once and for good; those about the server are not."""
    warnings = (JobWarning(ODD, "audio_reference"),)
    place.hold(2)
    with place.workers() as (_, crew):
        id = place.submit("odd sound")
        place.until(id, lambda job: job.window == 2)
        assert place.store.get(id).warnings == warnings
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert os.getpriority(os.PRIO_PROCESS, crew.pids()[0]) == min(19, own + NICENESS)
        assert os.getsid(crew.pids()[0]) == os.getsid(0), "Linux weighs sessions before niceness"
        os.kill(crew.pids()[0], signal.SIGKILL)
        place.until(id, lambda job: job.attempt == 2)
        place.go()
        job = place.finished(id)
    assert job.resumed_windows == 2 and job.attempt == 2 and job.warnings == warnings
    place.made_once(id)


@pytest.mark.parametrize("lease", [2.0, 600.0])
def test_a_killed_server_takes_its_workers_along_and_another_goes_on(place: Place, lease: float) -> None:
    """The next one knows that it is dead, and does not wait for a long lease."""
    place.hold(1)
    with place.driver(rules={"lease": lease}) as process:
        id = place.submit()
        place.until(id, lambda job: job.window == 1)
        process.kill()
        process.wait()
    worker = int(noted(place.notes, "begin")[0][2])
    end = time.monotonic() + WAIT_S
    while _alive(worker):
        assert time.monotonic() < end, "the worker outlives its server"
        time.sleep(0.02)
    assert place.store.get(id).status is JobStatus.in_progress  # nobody has noticed yet
    place.go()
    with place.driver(rules={"lease": lease}):
        job = place.finished(id)
    assert job.resumed_windows == 1 and job.attempt == 2
    place.made_once(id)


def test_without_locks_the_end_of_the_lease_gives_a_job_away(place: Place) -> None:
    """As on a file system that supports none: what can be known there is whose lease has ended."""
    id = place.submit()
    assert place.store.claim("elsewhere:1:aa/0", ["pocket"], 0.0) is not None
    (place.files.locks / f"{boot_id()}-0.lock").mkdir(parents=True)
    with place.workers():
        assert place.finished(id).attempt == 2


def test_a_stopped_server_is_not_dead(place: Place) -> None:
    """It does not report, and still holds its lock: only the end of its lease gives its job away."""
    place.hold(1)
    with place.driver(rules={"lease": 600.0}) as process:
        id = place.submit()
        place.until(id, lambda job: job.window == 1)
        process.send_signal(signal.SIGSTOP)
        with place.workers(lease=600.0) as _:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                assert place.store.get(id).attempt == 1
                time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
        place.go()
        assert place.finished(id).attempt == 1


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_servers_that_are_killed_lose_nothing(place: Place) -> None:
    """Three processes with two workers each share eight jobs; two of the processes are killed.

    A job whose process dies between its end and its record ends once more.
    """
    ids = [place.submit() for _ in range(8)]
    with place.driver(workers=2), place.driver(workers=2) as second:
        time.sleep(1.0)
        second.kill()
        time.sleep(0.5)
    with place.driver(workers=2):
        for id in ids:
            place.finished(id)
    for id in ids:
        place.made_once(id)
    assert {words[0] for words in noted(place.notes, "end")} == {*ids}


def test_sigterm_finishes_the_window_and_keeps_the_job(place: Place) -> None:
    place.hold(1)
    with place.driver() as process:
        id = place.submit()
        place.until(id, lambda job: job.window == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    job = place.store.get(id)
    done = len([words for words in noted(place.notes, "window") if words[0] == id])
    assert job.status is JobStatus.queued and job.window == done == 2
    place.go()
    with place.driver():
        job = place.finished(id)
    assert job.resumed_windows == done
    place.made_once(id)


def test_a_running_job_is_cancelled_at_its_next_step(place: Place) -> None:
    place.hold()
    with place.workers() as (_, _crew):
        id, next_id = place.submit(), place.submit()
        place.until(id, lambda job: job.status is JobStatus.in_progress)
        place.store.request_cancel(id)
        job = place.until(id, lambda job: job.status is JobStatus.failed)
        place.go()
        place.finished(next_id)
        assert id in place.ended
    assert job.error is not None and job.error.code == CANCELLED
    assert noted(place.notes, "window") and all(words[0] == next_id for words in noted(place.notes, "window"))
    assert not place.files.work(id).parent.exists()


def test_a_failed_job_says_why_and_the_next_one_is_made(place: Place) -> None:
    """Window 0 of the one whose process dies is a gain, so its first attempt may not count."""
    expected = {
        "bad picture": ("input", "invalid_request_error", 1),
        "bug in the code": ("server_error", "server_error", 3),
        "full disk": ("output", "server_error", 3),
        "die early": (WORKER_LOST, "server_error", MOST_LOSSES + 1),
    }
    with place.workers():
        ids = {place.submit(prompt): prompt for prompt in expected}
        after = place.submit()
        for id, prompt in ids.items():
            job = place.until(id, lambda job: job.status is JobStatus.failed)
            code, kind, attempts = expected[prompt]
            assert job.error is not None and (job.error.code, job.error.type) == (code, kind), job.error
            assert "secret" not in job.error.message and "\n" not in job.error.message
            assert attempts - (code == WORKER_LOST) <= job.attempt <= attempts
        place.finished(after)
        assert {*place.ended} >= {*ids}


def test_a_worker_that_does_not_start_is_started_again(place: Place) -> None:
    (place.notes / "no_engine").touch()
    with place.workers() as (workers, _):
        id = place.submit()
        end = time.monotonic() + WAIT_S
        while not workers.status().errors:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert "weights.pt: missing shard" in workers.status().errors[0]
        assert place.store.get(id).status is JobStatus.queued
        (place.notes / "no_engine").unlink()
        place.finished(id)


def test_a_worker_whose_job_was_given_away_is_ended(place: Place) -> None:
    """It was taken for dead, such as after a long pause of its machine; the other one waits for its lock."""
    place.hold()
    with place.workers() as (_, crew):
        id = place.submit()
        place.until(id, lambda job: job.status is JobStatus.in_progress)
        first = crew.pids()[0]

        def given_away(job: JobRecord) -> bool:
            """Again and again, because its worker extends its lease now and then."""
            with place.store.database.writing() as connection:  # as if its lease had run out
                connection.exec_driver_sql("UPDATE jobs SET lease_until = 0 WHERE attempt = 1")
            place.store.requeue_expired()
            return job.attempt == 2

        place.until(id, given_away)
        place.go()
        place.finished(id)
        assert crew.pids()[0] != first and not _alive(first)
    place.made_once(id)


def test_a_result_waits_while_the_database_is_killed_and_started_again(tmp_path: Path) -> None:
    folder = programs()
    if folder is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    server = PostgresServer(folder)
    try:
        place = Place(tmp_path, server.empty_database())
        with place.workers(lease=30.0) as (workers, _):
            place.hold(1)
            id, waiting = place.submit(), place.submit()
            place.until(id, lambda job: job.window == 1)
            server.kill()
            place.go()
            end = time.monotonic() + WAIT_S
            while not noted(place.notes, "end"):
                assert time.monotonic() < end
                time.sleep(0.02)
            while workers.status().running:  # made, and not yet recorded
                assert time.monotonic() < end
                time.sleep(0.02)
            server.start()
            assert place.finished(id).attempt == 1
            place.finished(waiting)
        place.made_once(id)
        place.store.close()
    finally:
        server.stop()


def test_workers_end_their_job_when_the_lease_ends_without_a_database(tmp_path: Path) -> None:
    """Another machine that still reaches the database may have it by now."""
    folder = programs()
    if folder is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    server = PostgresServer(folder)
    try:
        place = Place(tmp_path, server.empty_database())
        place.hold()
        with place.workers(lease=1.0) as (_, crew):
            id = place.submit()
            place.until(id, lambda job: job.status is JobStatus.in_progress)
            worker = int(crew.pids()[0])
            server.kill()
            end = time.monotonic() + WAIT_S
            while _alive(worker):
                assert time.monotonic() < end
                time.sleep(0.02)
            server.start()
            place.go()
            place.finished(id)
        place.made_once(id)
        place.store.close()
    finally:
        server.stop()


class FailingCrew(ProcessCrew):
    """A crew whose service ends once, as Ray's may."""

    lost = False

    def wait(self, seconds: float) -> Sequence[News]:
        if not FailingCrew.lost and any(progress.window for progress in self.progress([0]).values()):
            FailingCrew.lost = True
            raise CrewLost("Ray's process raylet on this machine ended")
        return super().wait(seconds)


def test_a_crew_whose_service_ends_is_opened_again(place: Place) -> None:
    place.hold(1)
    opened = []

    def open_crew() -> ProcessCrew:
        opened.append(FailingCrew(1, place.engines, place.files))
        return opened[-1]

    workers = Workers(place.store, place.files, open_crew, ["pocket"], WorkerRules(**RULES))
    id = place.submit()
    workers.start()
    try:
        place.until(id, lambda job: job.attempt == 2)
        place.go()
        assert place.finished(id).resumed_windows == 1
    finally:
        workers.stop()
        assert workers.join(WAIT_S)
    assert len(opened) == 2
    place.made_once(id)
