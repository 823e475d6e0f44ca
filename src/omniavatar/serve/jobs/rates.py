"""How many requests each caller makes in a minute, over all API processes of one database.

A process counts at once and exchanges its counts with the others about once a second, outside of any request.
So together they may exceed a limit by what arrives in that second. Counts survive a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import sqlalchemy as sa

from omniavatar.serve.jobs.database import RATES, Database
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.tables import request_counts

EXCHANGE_S = 1.0
_MINUTE_S = 60
_log = logging.getLogger("omniavatar.serve")


class Rates:
    """Counts requests in a sliding minute: those of this minute, and a part of those of the last one.

    clock: seconds since 1970, about the same on all machines.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database, self._clock = database, clock
        self._lock = threading.Lock()
        self._known: Counter[tuple[str, int]] = Counter()
        self._new: Counter[tuple[str, int]] = Counter()
        self._has_read = False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def hit(self, who: str, limit: int) -> bool:
        """Count a request; False, and not counted, if it exceeds `limit` a minute."""
        now = self._clock()
        minute = int(now // _MINUTE_S)
        left = 1 - now % _MINUTE_S / _MINUTE_S
        with self._lock:
            if self._count(who, minute - 1) * left + self._count(who, minute) + 1 > limit:
                return False
            self._new[who, minute] += 1
            return True

    def exchange(self) -> None:
        """Add what this process counted to the database, and read what the others did. Raises StoreError."""
        minute = int(self._clock() // _MINUTE_S)
        with self._lock:
            sent, self._new = self._new, Counter()
            self._known += sent  # until the database says more
        if not sent and self._has_read:
            return
        try:
            with self._database.writing(RATES) as connection:
                for (who, when), count in sorted(sent.items()):
                    same = sa.and_(request_counts.c.who == who, request_counts.c.minute == when)
                    total = {"requests": request_counts.c.requests + count}
                    if not connection.execute(request_counts.update().where(same).values(**total)).rowcount:
                        values = {"who": who, "minute": when, "requests": count}
                        connection.execute(request_counts.insert().values(**values))
                connection.execute(request_counts.delete().where(request_counts.c.minute < minute - 1))
                rows = connection.execute(sa.select(request_counts)).all()
        except StoreError:
            with self._lock:
                self._known -= sent
                self._new += sent
                self._drop_before(minute - 1)
            raise
        with self._lock:
            self._known = Counter({(row.who, row.minute): row.requests for row in rows})
            self._has_read = True

    def start(self) -> None:
        """Exchange counts from a thread until `stop`."""
        self._thread = threading.Thread(target=self._run, name="rates", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _count(self, who: str, minute: int) -> int:
        return self._known[who, minute] + self._new[who, minute]

    def _drop_before(self, minute: int) -> None:
        for counts in (self._known, self._new):
            for key in [key for key in counts if key[1] < minute]:
                del counts[key]

    def _run(self) -> None:
        away = ends = False
        while not ends:
            try:
                self.exchange()
                away = False
            except StoreError as error:
                if not away:
                    _log.error("requests are counted by this process alone: %s", error)
                away = True
            ends = self._over.wait(EXCHANGE_S)
        with suppress(StoreError):  # what is lost are the counts of the last second
            self.exchange()
