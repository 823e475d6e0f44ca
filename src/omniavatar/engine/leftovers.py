"""What runs left on disk: unfinished jobs and calibrations, previews, lock files, cached prompt embeddings.

Only what carries our mark (`engine.marks`) is found, and nothing that a living process holds is deleted.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omniavatar.encoders.text_cache import SUFFIX, is_entry
from omniavatar.engine.job import Job
from omniavatar.engine.marks import OWNER, STATE, is_job_folder, is_preview, job_files, sidecar_record
from omniavatar.errors import BusyError, InputError, OutputError
from omniavatar.media.atomic import translate_os_error
from omniavatar.media.lease import holder_of, is_held, is_lock, lease_for, remove_stale
from omniavatar.plan.sparse_progress import SUFFIX as PART
from omniavatar.plan.sparse_progress import is_progress_file

DAY_S = 86400
_TEMPORARY = re.compile(r"\.(?P<name>.*)\.[0-9a-f]{8}\.tmp", re.DOTALL)


@dataclass(frozen=True)
class Leftover:
    """Something that can be deleted.

    kind: unfinished job, unfinished calibration, preview, lock, temporary file, cached prompt.
    paths: what is deleted; of a job folder, only the files that are ours.
    holder: the living process that uses it; it is then kept.
    """

    kind: str
    paths: tuple[Path, ...]
    size: int
    holder: str | None = None


def find_leftovers(place: Path, cache_days: float) -> list[Leftover]:
    """Leftovers of the output `place`, or in the folder `place` and those inside it.

    cache_days: cached prompts written less than this many days ago are left out.

    Raises InputError if `place` is neither.
    """
    if place.is_dir():
        folders = [Path(folder) for folder, _, _ in os.walk(place)]
        return [found for folder in folders for found in _in_folder(folder, cache_days)]
    job = Job(place)
    found = _job(job.folder, job.partial)
    if found is None and not place.exists():
        raise InputError(f"{place}: is neither a folder nor an output with leftovers; check the path")
    return [] if found is None else [found]


def delete(leftover: Leftover) -> bool:
    """Delete it; False if a process uses it now. Raises OutputError."""
    try:
        if leftover.kind == "unfinished job":
            folder, *previews = leftover.paths
            with lease_for(folder / OWNER, folder):
                if not is_job_folder(folder):
                    return False
                with translate_os_error(folder):
                    _delete_job(folder, previews)
            with translate_os_error(folder):
                if not any(folder.iterdir()):
                    folder.rmdir()
        elif leftover.kind == "lock":
            return remove_stale(leftover.paths[0])
        elif leftover.kind == "unfinished calibration" and is_held(leftover.paths[0].with_suffix(".lock")):
            return False
        else:
            with translate_os_error(leftover.paths[0]):
                leftover.paths[0].unlink(missing_ok=True)
    except BusyError:
        return False
    return True


def _delete_job(folder: Path, previews: list[Path]) -> None:
    files = [path for path in job_files(folder) if path.name not in (OWNER, STATE)]
    for path in (*previews, *files, folder / STATE):
        path.unlink(missing_ok=True)


def _in_folder(folder: Path, cache_days: float) -> Iterator[Leftover]:
    if folder.name.endswith(".job") and is_job_folder(folder):
        return
    try:
        paths = sorted(folder.iterdir())
    except PermissionError:
        return
    taken: set[Path] = set()
    for path in paths:
        if path.name.endswith(".job") and path.is_dir():
            job = Job(path.with_name(path.name.removesuffix(".job")))
            found = _job(path, job.partial)
            if found is not None:
                taken |= set(found.paths)
                yield found
    for path in paths:
        kind = None if path in taken or path.is_symlink() or not path.is_file() else _kind(path, cache_days)
        if kind is not None:
            lock = {"lock": path, "unfinished calibration": path.with_suffix(".lock")}.get(kind)
            yield Leftover(kind, (path,), path.stat().st_size, _holder(lock) if lock is not None else None)


def _job(folder: Path, preview: Path) -> Leftover | None:
    if not is_job_folder(folder) or not any(folder.iterdir()):
        return None
    previews = [preview] if preview.is_file() and not preview.is_symlink() else []
    size = sum(path.lstat().st_size for path in (*job_files(folder), *previews))
    return Leftover("unfinished job", (folder, *previews), size, _holder(folder / OWNER))


def _holder(lock: Path) -> str | None:
    """The living process that holds the lock file, if there is one."""
    return holder_of(lock) if is_held(lock) else None


def _kind(path: Path, cache_days: float) -> str | None:
    """What sort of leftover the file is; None for a file that is not ours."""
    name = path.name
    try:
        if name.endswith(".lock"):
            return "lock" if is_lock(path) else None
        if name.endswith(PART):
            return "unfinished calibration" if is_progress_file(path) else None
        if name.endswith(".mp4"):
            return "preview" if is_preview(path) else None
        if name.endswith(SUFFIX):
            return "cached prompt" if _is_old_embedding(path, cache_days) else None
        temporary = _TEMPORARY.fullmatch(name)
        if temporary is not None and _belongs_to_us(path.with_name(temporary["name"])):
            return "temporary file"
    except (PermissionError, OutputError):  # another user's
        return None
    return None


def _belongs_to_us(target: Path) -> bool:
    """Whether `target` is a video or a sidecar of ours, made or being made."""
    if target.suffix == ".json":
        target = target.with_suffix(".mp4")
    job = Job(target)
    return is_job_folder(job.folder) or sidecar_record(job.sidecar) is not None


def _is_old_embedding(path: Path, cache_days: float) -> bool:
    if time.time() - path.stat().st_mtime < cache_days * DAY_S:
        return False
    return is_entry(path.read_bytes())
