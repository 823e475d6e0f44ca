"""Files that are either complete or absent, and operating system errors as one clear line.

A file is written under a temporary name in its folder, flushed to the disk, then renamed to the final name.
So neither a crash nor a full disk leaves half a file under that name.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omniavatar.errors import OutputError

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EFBIG: "the file grew beyond the allowed size; raise the limit (ulimit -f) or choose another disk",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "the folder does not exist; create it first",
    errno.ENOTDIR: "part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "a folder of that name exists; choose another file name",
    errno.ENAMETOOLONG: "the file name is too long; choose a shorter one",
    errno.EIO: "the disk reported an input/output error; check it or choose another disk",
}


@contextmanager
def translate_os_error(path: str | Path) -> Iterator[None]:
    """Turn errors of writing `path` (disk full, permission denied, ...) into an `OutputError`.

    It includes PyAV's errors, which derive from `OSError`; other errors are not changed.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        raise OutputError(f"cannot write {path}: {remedy}") from error


def sync_folder(folder: Path) -> None:
    """Flush renames in `folder` to the disk, so that they survive a power cut (POSIX only)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block, flush that file and rename it to `path`.

    If the block fails, the temporary file is removed and `path` is unchanged. Raises OutputError for the
    errors of `translate_os_error`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    with translate_os_error(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, completely or not at all. Raises OutputError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON to `path`, completely or not at all.

    A byte of a file name that is not UTF-8 becomes a JSON escape such as `\\udce9`, which reading turns back.

    Raises OutputError, and ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode(errors="backslashreplace"))


def check_writable(folder: str | Path) -> None:
    """Create `folder` if it does not exist, and write a small test file in it. Raises OutputError."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is a file, not a folder; choose another folder")
    with translate_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test.{secrets.token_hex(4)}.tmp"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                probe.unlink()
