"""The right to work on one file, for one process at a time.

An advisory lock (flock) on a small file beside the output. The kernel gives it back when its holder dies,
also by kill -9, so there is no stale lease and no clock to compare. The file is removed on release; a lock
counts only if the file that was locked is still the one under that name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from omniavatar.errors import OutputError
from omniavatar.media.atomic import translate_os_error

_BUSY = (errno.EWOULDBLOCK, errno.EACCES)
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lease:
    """A lease that is held; a context manager that gives it back."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle

    def release(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def try_lease(path: Path) -> Lease | None:
    """The lease on `path`, or None while another process has it. Raises OutputError."""
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in _BUSY:
                return None
            if error.errno in _NOT_SUPPORTED:
                raise OutputError(
                    f"{path.parent}: this file system has no locks; choose a folder on another one"
                ) from None
            raise
        if _is_still(path, handle):
            break
        os.close(handle)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 3)}
    text = json.dumps(holder).encode()
    with suppress(OSError):  # for people only; a full disk must not cost the lease
        os.pwrite(handle, text, 0)
        if os.fstat(handle).st_size > len(text):  # a killed holder's
            os.ftruncate(handle, len(text))
    return Lease(path, handle)


def _open(path: Path) -> int:
    how = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, how, 0o644)
    except OSError:  # seldom: the folder is not there yet, or is no folder
        try:
            with translate_os_error(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(f"{path.parent}: is a file, not a folder; choose another folder") from None
        with translate_os_error(path):
            return os.open(path, how, 0o644)


def _is_still(path: Path, handle: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)


def holder_of(path: Path) -> str:
    """Who has the lease, for a message: `process 4711 on node7`."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
