"""Which processes with workers have died. Two `Presence`s of one process stand for two processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from omniavatar.media.lease import try_lease
from omniavatar.serve.jobs.presence import Presence
from omniavatar.serve.jobs.records import JobSpec, JobStatus
from omniavatar.serve.jobs.store import JobStore

SPEC = JobSpec("pocket", "a person speaks", "input/a.png", None)


def died(folder: Path) -> Presence:
    """A process that was killed: its lock file is there, and nobody holds it."""
    dead, before = Presence(folder, "boot"), set(folder.iterdir())
    dead.enter()
    (path,) = set(folder.iterdir()) - before
    dead.leave()
    lease = try_lease(path)
    assert lease is not None
    lease.abandon()
    return dead


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Presence]:
    made = Presence(tmp_path, "boot")
    made.enter()
    yield made
    made.leave()


def test_only_a_lock_that_can_be_taken_is_a_death(tmp_path: Path, living: Presence) -> None:
    other = Presence(tmp_path, "boot")
    other.enter()
    names = [living.name, other.name, "elsewhere:1:abcdef"]
    assert list(living.dead(names)) == []
    other.leave()
    dead = died(tmp_path)
    names = [*names, dead.name]
    assert list(living.dead(names)) == [dead.name]
    assert list(living.dead(names)) == [], "its lock is gone"
    assert len(list(tmp_path.iterdir())) == 1, "the living one's"


def test_while_one_takes_over_no_other_does(tmp_path: Path, living: Presence) -> None:
    other, third = died(tmp_path), Presence(tmp_path, "boot")
    for name in living.dead([other.name]):
        assert name == other.name and list(third.dead([other.name])) == []


def test_a_lock_that_cannot_be_read_proves_nothing_and_hides_nothing(
    tmp_path: Path, living: Presence
) -> None:
    other = died(tmp_path)
    (foreign := tmp_path / "boot-0.lock").write_text("of another program")
    (tmp_path / "boot-1.lock").mkdir()
    assert list(living.dead([other.name])) == [other.name]
    assert foreign.read_text() == "of another program"


def test_a_death_is_told_again_if_nothing_could_be_done_about_it(tmp_path: Path, living: Presence) -> None:
    other = died(tmp_path)
    with closing(living.dead([other.name])) as dead:
        assert next(dead) == other.name  # and here the database does not answer
    assert list(living.dead([other.name])) == [other.name]
    assert list(living.dead([other.name])) == []


@pytest.mark.parametrize("boot", ["another boot", None])
def test_locks_of_another_kernel_say_nothing(tmp_path: Path, living: Presence, boot: str | None) -> None:
    other = died(tmp_path)
    elsewhere = Presence(tmp_path, boot)
    elsewhere.enter()
    assert list(elsewhere.dead([other.name, living.name])) == []
    elsewhere.leave()
    assert list(living.dead([other.name])) == [other.name]


def test_the_jobs_of_a_dead_process_wait_again(store: JobStore) -> None:
    for _ in range(3):
        store.submit("key", SPEC)
    workers = ["host:1:aa/0", "host:1:aa/1", "host:1:a/0"]
    claims = [store.claim(worker, ["pocket"], 600) for worker in workers]
    ids = [claim.job.id for claim in claims if claim is not None]
    assert store.processes() == {"host:1:aa", "host:1:a"}
    assert sorted(store.requeue_of("host:1:aa")) == sorted(ids[:2])
    assert [store.get(id).status for id in ids] == [JobStatus.queued, JobStatus.queued, JobStatus.in_progress]
    assert store.requeue_of("host:1:aa") == [] and store.processes() == {"host:1:a"}
    assert claims[0] is not None and not store.release(claims[0]), "its claim is void"
    assert store.requeue_of("host:1:%") == []
