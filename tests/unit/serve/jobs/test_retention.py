"""Retention by age and size."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from omniavatar.errors import OutputError
from omniavatar.serve.jobs.errors import JobNotFoundError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import VIDEO, JobError, JobResult, JobSpec, JobStatus, new_job_id
from omniavatar.serve.jobs.retention import Retention, sweep
from omniavatar.serve.jobs.store import JobStore

SPEC = JobSpec("pocket", "a person speaks", "input/a.png", "input/b.wav")
DAY = 86_400.0


def finished(store: JobStore, files: JobFiles, size: int, keep: float | None) -> str:
    """A completed job with a video of `size` bytes that expires after `keep` seconds."""
    job, _ = store.submit("key", SPEC)
    files.put(job.id, VIDEO, io.BytesIO(b"x" * size))
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None
    now = store.get(job.id).created_at
    expires = None if keep is None else now + keep
    store.complete(claim, JobResult(VIDEO, size, 1.0, 1, expires_at=expires))
    return job.id


def left(store: JobStore, files: JobFiles, ids: list[str]) -> list[int]:
    """Which of the jobs are left, with record and file together."""
    found = {job.id for job in store.list(limit=100).jobs}
    assert [files.size(id, VIDEO) is not None for id in ids] == [id in found for id in ids]
    return [index for index, id in enumerate(ids) if id in found]


def test_a_job_goes_when_it_expires_and_not_before(store: JobStore, clock, tmp_path: Path) -> None:
    files = JobFiles(str(tmp_path / "files"))
    ids = [finished(store, files, 10, keep) for keep in (5 * DAY, 2 * DAY, None)]
    clock.time += 2 * DAY - 1
    assert sweep(store, files, age=3 * DAY).removed == ()
    clock.time += 1
    assert sweep(store, files, age=3 * DAY).removed == (ids[1],)
    clock.time += DAY
    assert sweep(store, files, age=3 * DAY).removed == (ids[2],)
    assert left(store, files, ids) == [0]


def test_room_is_made_with_the_oldest_expired_and_never_with_others(
    store: JobStore, clock, tmp_path: Path
) -> None:
    files, ids = JobFiles(str(tmp_path / "files")), []
    for keep in (9 * DAY, DAY, DAY, DAY):
        ids.append(finished(store, files, 100, keep))
        clock.time += 1
    clock.time += 2 * DAY
    assert sweep(store, files, DAY, total_bytes=400).removed == ()
    swept = sweep(store, files, DAY, total_bytes=250)
    assert swept.removed == (ids[1], ids[2]) and (swept.freed_bytes, swept.kept_bytes) == (200, 200)
    swept = sweep(store, files, DAY, total_bytes=50)
    assert swept.removed == (ids[3],) and swept.too_many == 50
    assert left(store, files, ids) == [0]


def test_unfinished_jobs_stay_and_failed_ones_go_by_age(store: JobStore, clock, tmp_path: Path) -> None:
    files = JobFiles(str(tmp_path / "files"))
    waiting, _ = store.submit("other", SPEC)
    running, _ = store.submit("other", SPEC, priority=1)
    failed, _ = store.submit("other", SPEC, priority=2)
    claim = store.claim("worker", ["pocket"], 60)
    assert claim is not None and claim.job.id == failed.id
    store.fail(claim, JobError("input", "broken", "invalid_request_error"), retry=False)
    assert store.claim("worker", ["pocket"], 60) is not None
    clock.time += 100 * DAY
    assert sweep(store, files, age=101 * DAY, total_bytes=0).removed == ()
    assert sweep(store, files, age=DAY, total_bytes=None).removed == (failed.id,)
    assert store.get(waiting.id).status is JobStatus.queued
    assert store.get(running.id).status is JobStatus.in_progress


@pytest.mark.parametrize("fresh", [True, False])
def test_files_without_a_job_go_once_they_are_old(store: JobStore, tmp_path: Path, fresh: bool) -> None:
    """An upload that no accepted job followed; a fresh one may be accepted in a moment."""
    files, id = JobFiles(str(tmp_path / "files")), new_job_id()
    files.put(id, VIDEO, io.BytesIO(b"x"))
    if not fresh:
        old = time.time() - DAY - 60
        os.utime(tmp_path / "files" / id, (old, old))
    sweep(store, files, DAY)
    assert (files.size(id, VIDEO) is not None) == fresh
    with pytest.raises(JobNotFoundError):
        store.get(id)


class TornFiles(JobFiles):
    """A place whose first listing fails."""

    def ids(self, older_than_s: float = 0.0) -> Iterator[str]:
        if not (Path(self.place) / "listed").exists():
            (Path(self.place) / "listed").touch()
            raise OutputError("the disk reported an error")
        yield from super().ids(older_than_s)


def test_a_thread_deletes_what_expires_goes_on_after_an_error_and_ends(
    store: JobStore, clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = TornFiles(str(tmp_path / "files"))
    ids = [finished(store, files, 100, keep) for keep in (DAY, 3 * DAY)]
    retention = Retention(store, files, age=DAY, total_bytes=None, every=0.01)
    retention.start()
    try:
        end = time.monotonic() + 30
        while "the disk reported an error" not in caplog.text:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert left(store, files, ids) == [0, 1]
        clock.time += 2 * DAY
        while files.size(ids[0], VIDEO) is not None:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        assert retention.stop()
    clock.time += 2 * DAY
    time.sleep(0.05)
    assert left(store, files, ids) == [1], "its thread has ended"


def test_finished_videos_of_another_database_stay_until_they_are_old(store: JobStore, tmp_path: Path) -> None:
    """Such as after a start with another --database, whose records know none of them."""
    files, id = JobFiles(str(tmp_path / "files")), new_job_id()
    files.put(id, VIDEO, io.BytesIO(b"x"))
    old = time.time() - DAY
    os.utime(tmp_path / "files" / id, (old, old))
    sweep(store, files, 2 * DAY)
    assert files.size(id, VIDEO) == 1
