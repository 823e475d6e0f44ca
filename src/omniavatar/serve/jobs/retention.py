"""Deletes jobs whose time is over. A finished file is never deleted before its job expires."""

from __future__ import annotations

from dataclasses import dataclass

from omniavatar.serve.jobs.errors import JobNotFoundError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.store import JobStore


@dataclass(frozen=True)
class Swept:
    """What a sweep did. kept_bytes: of videos that stay. too_many: bytes above the limit, not expired yet."""

    removed: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int
    too_many: int


def sweep(store: JobStore, files: JobFiles, age: float, total_bytes: int | None = None) -> Swept:
    """Remove expired jobs with their files, and files that no job owns.

    age: seconds that a job without an expiry, such as a failed one, is kept after its end.
    total_bytes: without it, all expired jobs go; with it, only as many of them, oldest first, as bring the
    finished videos below this size.

    Raises StoreError, OutputError.
    """
    ended = store.ended(age)
    total = sum(job.size_bytes for job in ended)
    removed, freed = [], 0
    for job in ended:
        if not job.expired or (total_bytes is not None and total - freed <= total_bytes):
            continue
        if store.expire(job.id, age):
            files.delete(job.id)
            removed.append(job.id)
            freed += job.size_bytes
    for id in set(files.ids()):
        try:
            store.get(id)
        except JobNotFoundError:
            files.delete(id)
    kept = total - freed
    return Swept(tuple(removed), freed, kept, max(0, kept - total_bytes) if total_bytes is not None else 0)
