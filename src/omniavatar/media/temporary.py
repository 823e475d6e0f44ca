"""Temporary folders that a later process can tell from those of the living.

A killed process cannot remove its folders. So each has a lease beside its files: the kernel releases it with
the process, and a server that starts removes the folders whose lease nobody holds.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omniavatar.errors import OutputError
from omniavatar.media.atomic import translate_os_error
from omniavatar.media.lease import is_lock, try_lease

LOCK, RAY = "temporary.lock", "oa-"
"""Lock file of each folder; first letters of a folder of Ray."""
_FILES = "files"
_NAME = re.compile(rf"(omniavatar-([a-z]+-)?|{RAY})[a-z0-9_]{{8}}")
_WITHOUT_LEASE = re.compile(r"omniavatar-(upload|speech|inputs)-[a-z0-9_]{8}")
"""Folders of older versions."""
_OLD_S = 86400.0


@contextmanager
def temporary_folder(kind: str = "") -> Iterator[Path]:
    """A new private folder that exists while the body runs. kind: lower-case word of its name.

    Raises OutputError if none can be made.
    """
    root = Path(tempfile.gettempdir())
    with translate_os_error(root):
        folder = Path(tempfile.mkdtemp(prefix=f"omniavatar-{kind}-" if kind else "omniavatar-", dir=root))
    lease = None
    try:
        lease = try_lease(folder / LOCK)
        with translate_os_error(root):
            (folder / _FILES).mkdir()
        yield folder / _FILES
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)  # under the lease, so that nobody else removes it too
        if lease is not None:
            lease.release()


def remove_abandoned(root: Path | None = None) -> int:
    """Remove this user's temporary folders whose process has died; returns their number.

    root: by default the folder of this process's temporary files.
    """
    removed = 0
    for path in (root or Path(tempfile.gettempdir())).iterdir():
        if _NAME.fullmatch(path.name):
            with suppress(OSError, OutputError):  # another process was faster, or forbids it
                removed += _is_own(path) and _removed(path)
    return removed


def _is_own(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())


def _removed(path: Path) -> bool:
    """Remove the folder unless its process lives; whether it was removed."""
    lock = path / LOCK
    if lock.is_file() and is_lock(lock):  # one without its text is being taken right now
        lease = try_lease(lock, create=False)
        if lease is None:
            return False
        with lease:
            shutil.rmtree(path)
        return True
    is_old = path.lstat().st_mtime < time.time() - _OLD_S
    if is_old and (lock.is_file() or _WITHOUT_LEASE.fullmatch(path.name)):
        shutil.rmtree(path)
        return True
    return False
