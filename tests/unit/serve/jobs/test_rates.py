"""Requests a minute, counted by several processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from omniavatar.serve.jobs.database import Database
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.rates import Rates
from omniavatar.serve.jobs.store import JobStore

MINUTE = 60.0


def hits(rates: Rates, count: int, limit: int = 4) -> list[bool]:
    return [rates.hit("one", limit) for _ in range(count)]


def test_a_caller_has_so_many_requests_in_a_sliding_minute(store: JobStore, clock) -> None:
    clock.time = 100 * MINUTE
    rates = Rates(store.database, clock)
    assert hits(rates, 6) == [True] * 4 + [False] * 2
    assert rates.hit("two", 4)
    clock.time += MINUTE + 30
    assert hits(rates, 3) == [True, True, False], "half of the last minute still counts"
    clock.time += 2 * MINUTE
    assert hits(rates, 5) == [True] * 4 + [False]


def test_processes_share_their_counts_and_a_restart_keeps_them(store: JobStore, clock) -> None:
    clock.time = 100 * MINUTE
    first, second = Rates(store.database, clock), Rates(store.database, clock)
    assert hits(first, 2) + hits(second, 2) == [True] * 4
    for rates in (first, second, first):
        rates.hit("another", 1000)
        rates.exchange()
    assert hits(first, 1) + hits(second, 1) == [False, False]
    restarted = Rates(store.database, clock)
    restarted.exchange()
    assert hits(restarted, 1) == [False]
    clock.time += 2 * MINUTE
    restarted.hit("one", 4)
    restarted.exchange()
    assert hits(restarted, 4) == [True] * 3 + [False], "old counts are gone"


class Away(Database):
    """A database that does not answer while `away`."""

    away = True

    @contextmanager
    def writing(self, lock: int | None = None) -> Iterator[object]:  # type: ignore[override]
        if Away.away:
            raise StoreError("the job database does not answer")
        with super().writing(lock) as connection:
            yield connection


def test_a_process_counts_alone_while_the_database_is_away(tmp_path, clock) -> None:
    database = Away(f"sqlite:///{tmp_path}/jobs.db")
    JobStore.open(f"sqlite:///{tmp_path}/jobs.db").close()
    rates = Rates(database, clock)
    assert hits(rates, 2) == [True] * 2
    with pytest.raises(StoreError):
        rates.exchange()
    assert hits(rates, 3) == [True, True, False]
    Away.away = False
    rates.exchange()
    other = Rates(database, clock)
    other.exchange()
    assert hits(other, 1) == [False], "nothing was lost and nothing counted twice"
    database.close()


def test_a_thread_exchanges_the_counts_and_ends(store: JobStore, clock) -> None:
    first, second = Rates(store.database, clock), Rates(store.database, clock)
    first.start()
    try:
        assert hits(first, 4) == [True] * 4
        end = time.monotonic() + 30
        while second.hit("one", 4):
            second = Rates(store.database, clock)
            second.exchange()
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        first.stop()
