"""Only one holder at a time, whatever kills it; nothing but our own lock files is touched."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from lease_holder import hold
from omniavatar.errors import OutputError, TargetError
from omniavatar.media.lease import holder_of, remove_stale, try_lease


@pytest.mark.slow
def test_only_one_holds_a_lease_and_it_is_released_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.lock"
    process = hold(path)
    assert try_lease(path) is None
    assert holder_of(path).startswith(f"process {process.pid} on ")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lease = try_lease(path)
    assert lease is not None
    with lease:
        assert try_lease(path) is None and f"process {os.getpid()}" in holder_of(path)
    assert not path.exists() and try_lease(path) is not None


def test_lease_on_a_name_that_was_taken_over_does_not_count(tmp_path: Path, monkeypatch) -> None:
    """Between open and lock, the holder releases the lease and another process creates a new lock file."""
    path = tmp_path / "a.lock"
    real, steps = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not steps:
            steps.append("the old file is deleted, a new one has its name")
            path.unlink()
            steps.append(path.open("w"))
            real(steps[-1], fcntl.LOCK_EX)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert try_lease(path) is None


def test_lease_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        try_lease(tmp_path / "file" / "a.lock")


@pytest.mark.parametrize("content", ["mine", "{}", '{"a": 1}'])
def test_a_users_file_is_no_lock(tmp_path: Path, content: str) -> None:
    path = tmp_path / ".talk.mp4.lock"
    path.write_text(content)
    with pytest.raises(TargetError, match="is not a lock file of omniavatar"):
        try_lease(path)
    assert not remove_stale(path) and path.read_text() == content


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_no_lock(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.lock"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "target")
    else:
        os.mkfifo(path)
    with pytest.raises(TargetError, match="is not a lock file of omniavatar"):
        try_lease(path)
    assert {each.name for each in tmp_path.iterdir()} == {"a.lock"}


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="does not support locks; choose a folder on another one"):
        try_lease(tmp_path / "a.lock")
