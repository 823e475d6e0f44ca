"""Deletes jobs whose time is over. A finished file is never deleted before its job expires."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from omniavatar.errors import OmniAvatarError
from omniavatar.serve.jobs.errors import JobNotFoundError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.store import JobStore

LEAST_ORPHAN_S = 3600.0
_log = logging.getLogger("omniavatar.serve")


@dataclass(frozen=True)
class Swept:
    """What a sweep did. kept_bytes: of videos that stay. too_many: bytes above the limit, not expired yet."""

    removed: tuple[str, ...]
    freed_bytes: int
    kept_bytes: int
    too_many: int


def sweep(store: JobStore, files: JobFiles, age: float, total_bytes: int | None = None) -> Swept:
    """Remove expired jobs with their files, and files of that age that no job of this database owns.

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
    for id in set(files.ids(max(age, LEAST_ORPHAN_S))):
        try:
            store.get(id)
        except JobNotFoundError:
            files.delete(id)
    kept = total - freed
    return Swept(tuple(removed), freed, kept, max(0, kept - total_bytes) if total_bytes is not None else 0)


class Retention:
    """Sweeps from a thread. every: seconds between two sweeps. The others as for `sweep`."""

    def __init__(
        self, store: JobStore, files: JobFiles, age: float, total_bytes: int | None, every: float = 60.0
    ) -> None:
        self._sweep = lambda: sweep(store, files, age, total_bytes)
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> bool:
        """End the thread after its sweep; False if that takes longer than `seconds`."""
        self._over.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                swept = self._sweep()
            except OmniAvatarError as error:
                _log.error("old videos could not be deleted: %s", error)
            except Exception:
                _log.exception("a bug while old videos were deleted")
            else:
                if swept.removed or swept.too_many:
                    _log.info("deleted %d old videos, %d bytes", len(swept.removed), swept.freed_bytes)
                if swept.too_many:
                    _log.warning("finished videos have %d bytes more than keep_bytes", swept.too_many)
