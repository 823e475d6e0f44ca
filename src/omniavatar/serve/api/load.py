"""How many jobs wait or run, for decisions about many requests that need no exact number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from omniavatar.serve.jobs.store import JobStore

FRESH_S = 1.0
LONGEST_POLL_MS = 60_000


class QueueLoad:
    """Unfinished jobs, counted at most once in `FRESH_S` seconds.

    least_ms: shortest pause between two polls of a client.
    polls_per_second: of all clients together, if each of their jobs is polled as `poll_after_ms` says.
    """

    def __init__(
        self,
        store: JobStore,
        least_ms: int,
        polls_per_second: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._least_ms, self._polls, self._clock = store, least_ms, polls_per_second, clock
        self._counting = threading.Lock()
        self._unfinished, self._until, self._turn = 0, float("-inf"), 0.0
        self._turning = threading.Lock()

    def refreshed(self) -> int:
        """Unfinished jobs, not older than `FRESH_S` but for the time that counting takes; it blocks.

        Raises StoreError.
        """
        if self._clock() >= self._until and self._counting.acquire(blocking=self._until == float("-inf")):
            try:
                self._unfinished = self._store.unfinished()
                self._until = self._clock() + FRESH_S
            finally:
                self._counting.release()
        return self._unfinished

    def poll_after_ms(self) -> int:
        """When a client should ask again; it grows with the queue. It waits for no database.

        In a long queue, each answer gets the next turn. So clients that came at the same time, as after a
        restart, come back one after another.
        """
        paced = self._unfinished / self._polls
        if 1000 * paced <= self._least_ms:
            return self._least_ms
        with self._turning:
            now = self._clock()
            earliest, latest = now + paced / 2, now + paced * 1.5
            turn = self._turn + 1 / self._polls
            self._turn = turn if earliest <= turn <= latest else earliest
            after = round(1000 * (self._turn - now))
        return max(self._least_ms, min(after, LONGEST_POLL_MS))
