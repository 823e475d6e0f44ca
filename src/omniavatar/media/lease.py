"""Leases: only one process, and one thread of it, at a time may work on a file.

A lease is an advisory lock (flock) on a small file. The kernel releases it when its holder dies, even by
kill -9, so a lease never goes stale. A child made by fork gives its copies up, so it cannot keep the lease of
a dead parent. The lock file is removed on release; a lock counts only if the locked file still has that name.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from omniavatar.errors import BusyError, OutputError, TargetError
from omniavatar.media.atomic import translate_os_error
from omniavatar.text import printable

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)
_FOREIGN = "is not a lock file of omniavatar; move it away or choose another output"
_FLAGS = ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK")
_LOCKED_BYTE = 2**30
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MARK = b'{"host": '
_MOST_COMMAND = 120
_MOST_TRIES = 100

_held: weakref.WeakSet[Lease] = weakref.WeakSet()


class Lease:
    """A held lease; as a context manager, it releases the lease at the end."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle, self._process = path, handle, os.getpid()
        _held.add(self)

    def release(self) -> None:
        """Remove the lock file and release the lease. In a forked child it does nothing."""
        if self._process != os.getpid():
            return
        if sys.platform != "win32":  # which does not remove an open file
            with suppress(FileNotFoundError):
                self._path.unlink()
        os.close(self._handle)
        if sys.platform == "win32":
            with suppress(OSError):
                self._path.unlink()
        _held.discard(self)

    def abandon(self) -> None:
        """Release the lease as a death would: the lock file stays."""
        os.close(self._handle)
        _held.discard(self)

    def forget(self) -> None:
        """Close this forked child's copy; the parent keeps the lease."""
        with suppress(OSError):
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _forget_all() -> None:
    for lease in list(_held):
        lease.forget()
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_all)


def try_lease(path: Path, create: bool = True) -> Lease | None:
    """The lease on `path`, or None if another holder has it.

    create: make the file if it is missing; otherwise that is None too.

    Raises OutputError, and TargetError if `path` is a file that is no lock of this package.
    """
    for _ in range(_MOST_TRIES):
        try:
            handle = _open(path, create)
        except FileNotFoundError:
            return None
        try:
            _lock(handle)
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
    else:
        raise OutputError(f"{path}: the lock file is replaced again and again; try again later")
    if not _ours(handle):
        os.close(handle)
        raise TargetError(f"{path}: {_FOREIGN}")
    text = json.dumps(_about_this_process()).encode()
    with suppress(OSError):  # the text is for messages only; a full disk must not prevent the lease
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text)
    return Lease(path, handle)


def lease_for(path: Path, target: Path) -> Lease:
    """The lease on `path`, which stands for writing `target`. Raises BusyError if another holder has it."""
    lease = try_lease(path)
    if lease is None:
        raise BusyError(
            f"{target}: {holder_of(path)} is making it; wait until it ends, or choose another output"
        )
    return lease


def is_lock(path: Path) -> bool:
    """Whether the file holds the text of a lease."""
    with path.open("rb") as file:
        return file.read(len(_MARK)) == _MARK


def is_held(path: Path) -> bool:
    """Whether a living process holds the lease; the lock file is not changed."""
    flags = os.O_RDWR | sum(getattr(os, flag, 0) for flag in _FLAGS)
    try:
        handle = os.open(path, flags)
    except OSError:  # there is none, or it is another user's
        return path.exists()
    try:
        _lock(handle)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def remove_stale(path: Path) -> bool:
    """Remove the lock file of a process that died; False if it is held, or is no lock of this package."""
    try:
        lease = try_lease(path)
    except OutputError:
        return False
    if lease is None:
        return False
    lease.release()
    return True


def holder_of(path: Path) -> str:
    """The holder of the lease, for a message: `process 4711 on node7 (omniavatar generate, since ...)`."""
    try:
        holder: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        own = holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        thread = ", another thread of this process" if own else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        command = f"{holder['command']}, " if holder.get("command") else ""
        return f"process {holder['pid']} on {holder['host']}{thread} ({command}since {since})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"


def _about_this_process() -> dict[str, Any]:
    program = Path(sys.argv[0]).name or "python"
    words = ["omniavatar" if program == "__main__.py" else program, *sys.argv[1:]]
    command = printable(" ".join(words))
    if len(command) > _MOST_COMMAND:
        command = f"{command[:_MOST_COMMAND]}..."
    since = round(time.time(), 3)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": command}
    if threading.current_thread() is not threading.main_thread():
        about["thread"] = threading.current_thread().name
    return about


def _lock(handle: int) -> None:
    """Lock the file for this handle. Raises OSError if another handle has it."""
    if sys.platform == "win32":
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _open(path: Path, create: bool) -> int:
    """A handle of the lock file. A link is not followed. create: make it and its folder if missing."""
    flags = os.O_RDWR | (os.O_CREAT if create else 0) | sum(getattr(os, flag, 0) for flag in _FLAGS)
    for _ in range(_MOST_TRIES):
        try:
            return os.open(path, flags, 0o644)
        except (FileNotFoundError, NotADirectoryError):  # rare: the folder does not exist yet, or is a file
            if not create:
                raise FileNotFoundError(path) from None
        except OSError as error:
            if error.errno in _NO_FILE:
                raise TargetError(f"{path}: {_FOREIGN}") from None
            with translate_os_error(path):
                raise
        try:
            with translate_os_error(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise OutputError(f"{path.parent}: is a file, not a folder; choose another folder") from None
    raise OutputError(f"{path.parent}: the folder is removed again and again; try again later")


def _ours(handle: int) -> bool:
    """Whether the file is empty or holds the text of a lease."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        return False
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, len(_MARK)) in (b"", _MARK)


def _still_named(path: Path, handle: int) -> bool:
    try:
        on_disk = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    locked = os.fstat(handle)
    return (on_disk.st_ino, on_disk.st_dev) == (locked.st_ino, locked.st_dev)
