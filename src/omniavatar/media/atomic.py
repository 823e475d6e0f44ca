"""Files that are either complete or absent, and operating system errors as one clear line.

A file is written under a temporary name in its folder, flushed to the disk, then renamed to the final name.
So neither a crash nor a full disk leaves half a file under that name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omniavatar.errors import OutputError, TargetError

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
    errno.ELOOP: "its links lead in a circle; choose another path",
    errno.EILSEQ: "the file system does not accept this name; choose another one",
    errno.EIO: "the disk reported an input/output error; check it or choose another disk",
}
_OF_THE_NAME = (errno.ELOOP, errno.EILSEQ, errno.EISDIR, errno.ENAMETOOLONG)
"""Errors that another file in the same folder need not have."""


@contextmanager
def translate_os_error(path: str | Path) -> Iterator[None]:
    """Turn errors of writing `path` (disk full, permission denied, ...) into an `OutputError`.

    Errors of the name itself become a `TargetError`.

    It includes PyAV's errors, which derive from `OSError`; other errors are not changed.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        kind = TargetError if error.errno in _OF_THE_NAME else OutputError
        raise kind(f"cannot write {path}: {remedy}") from error


def beside(path: Path, before: str, middle: str, after: str) -> Path:
    """`<before><middle><after>` in the folder of `path`; a `middle` too long for the file system is cut.

    A cut name holds a hash of the whole one, so that two names stay different.
    """
    whole = f"{before}{middle}{after}"
    limit = _name_limit(path.parent)
    if len(os.fsencode(whole)) <= limit:
        return path.with_name(whole)
    digest = hashlib.sha256(os.fsencode(whole)).hexdigest()[:10]
    room = limit - len(os.fsencode(f"{before}~{digest}{after}"))
    kept = middle
    while len(os.fsencode(kept)) > room:
        kept = kept[:-1]
    return path.with_name(f"{before}{kept}~{digest}{after}")


def _name_limit(folder: Path) -> int:
    """Bytes that a file name in `folder` may have."""
    try:
        return int(os.pathconf(folder, "PC_NAME_MAX"))
    except (OSError, ValueError, AttributeError):  # the folder does not exist yet; Windows
        return 255


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
def atomic_path(path: str | Path, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; after the block, flush that file and rename it to `path`.

    folder: holds the temporary file, on the file system of `path` (default: the folder of `path`).

    If the block fails, the temporary file is removed and `path` is unchanged. Raises OutputError for the
    errors of `translate_os_error`.
    """
    path = Path(path)
    temporary = beside(path, ".", path.name[:80], f".{secrets.token_hex(4)}.tmp")
    if folder is not None:
        temporary = folder / temporary.name
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


def atomic_write_bytes(path: str | Path, data: bytes, folder: Path | None = None) -> None:
    """Write `data` to `path`, completely or not at all; `folder` as for `atomic_path`. Raises OutputError."""
    with atomic_path(path, folder) as temporary:
        temporary.write_bytes(data)


def atomic_write_json(path: str | Path, value: Any, folder: Path | None = None) -> None:
    """Write `value` as indented UTF-8 JSON to `path`, completely or not at all.

    Bytes of a file name that are not UTF-8 (lone surrogates) are written as JSON escapes.

    folder: as for `atomic_path`.

    Raises OutputError, and ValueError for NaN and infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"), folder)


def check_writable(folder: str | Path) -> None:
    """Create `folder` if it does not exist, and write a small test file in it. Raises OutputError."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is a file, not a folder; choose another folder")
    with translate_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".write-test.") as probe:  # no name, so nothing stays
            probe.write(b"\0" * 4096)
