"""Leases: only one process at a time may work on a file.

A lease is an advisory lock (flock) on a small file beside the output. The kernel releases it when its holder
dies, even by kill -9, so a lease never goes stale. The lock file is removed on release; a lock counts only
if the locked file still has that name.
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
    """A held lease; as a context manager, it releases the lease at the end."""

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
    """The lease on `path`, or None if another process holds it. Raises OutputError."""
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
                    f"{path.parent}: this file system does not support locks; choose a folder on another one"
                ) from None
            raise
        if _still_named(path, handle):
            break
        os.close(handle)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": round(time.time(), 3)}
    text = json.dumps(holder).encode()
    with suppress(OSError):  # the text is for messages only; a full disk must not prevent the lease
        os.pwrite(handle, text, 0)
        if os.fstat(handle).st_size > len(text):  # the rest of a killed holder's text
            os.ftruncate(handle, len(text))
    return Lease(path, handle)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except OSError:  # rare: the folder does not exist yet, or is a file
        try:
            with translate_os_error(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(f"{path.parent}: is a file, not a folder; choose another folder") from None
        with translate_os_error(path):
            return os.open(path, flags, 0o644)


def _still_named(path: Path, handle: int) -> bool:
    try:
        on_disk = path.stat()
    except FileNotFoundError:
        return False
    locked = os.fstat(handle)
    return (on_disk.st_ino, on_disk.st_dev) == (locked.st_ino, locked.st_dev)


def holder_of(path: Path) -> str:
    """The holder of the lease, for a message: `process 4711 on node7`."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
