"""Writes that come at the same time share a transaction, and one that fails takes no other along."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from omniavatar.serve.jobs import database as module
from omniavatar.serve.jobs.database import SUBMIT, Database
from omniavatar.serve.jobs.errors import QueueFullError, StoreError
from omniavatar.serve.jobs.group_commit import GroupCommit

numbers = sa.table("numbers", sa.column("value", sa.Integer))


class Counted(Database):
    """Counts its transactions that write. held: they wait for it."""

    transactions = 0

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.held = threading.Lock()

    def writing(self, lock: int | None = None):  # type: ignore[no-untyped-def]
        with self.held:
            self.transactions += 1
        return super().writing(lock)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Counted]:
    found = Counted(f"sqlite:///{tmp_path / 'numbers.db'}")
    with found.writing() as connection:
        connection.execute(sa.text("CREATE TABLE numbers (value INTEGER UNIQUE)"))
    found.transactions = 0
    yield found
    found.close()


def stored(database: Database) -> list[int]:
    with database.reading() as connection:
        return list(connection.execute(sa.select(numbers.c.value).order_by(numbers.c.value)).scalars())


def insert(value: int) -> Callable[[Connection], int]:
    def write(connection: Connection) -> int:
        connection.execute(sa.insert(numbers).values(value=value))
        return value * 10

    return write


def refuse(connection: Connection) -> int:
    raise QueueFullError("the queue is full")


def break_down(connection: Connection) -> int:
    connection.execute(sa.insert(numbers).values(value=777))
    raise ValueError("a bug after the first write")


def together(
    database: Counted, group: GroupCommit[int], writes: list[Callable[[Connection], int]]
) -> list[object]:
    """What each write returned or raised; all wait before the first transaction."""

    def run(write: Callable[[Connection], int]) -> object:
        try:
            return group.write(write)
        except Exception as error:
            return type(error)

    with ThreadPoolExecutor(len(writes)) as pool:
        with database.held:
            runs = [pool.submit(run, write) for write in writes]
            end = time.monotonic() + 20
            while group.waiting < len(writes) - 1:
                assert time.monotonic() < end
                time.sleep(0.005)
        return [each.result() for each in runs]


def test_writes_that_wait_share_a_transaction(database: Counted) -> None:
    found = together(database, GroupCommit(database, SUBMIT), [insert(n) for n in range(20)])
    assert found == [n * 10 for n in range(20)] and stored(database) == list(range(20))
    assert database.transactions == 2, "the first one, and one for all that came meanwhile"


@pytest.mark.parametrize(
    ("bad", "raised"), [(refuse, QueueFullError), (break_down, ValueError), (insert(3), StoreError)]
)
def test_a_write_that_fails_takes_no_other_along(
    database: Counted, bad: Callable[[Connection], int], raised: type[Exception]
) -> None:
    writes = [insert(n) for n in range(6)]
    found = together(database, GroupCommit(database, SUBMIT), [*writes, bad])
    if raised is StoreError:  # the same number twice: one of both
        assert sorted(map(str, found[:6])) != sorted(map(str, found)) and stored(database) == list(range(6))
        return
    assert found == [*(n * 10 for n in range(6)), raised]
    assert stored(database) == list(range(6)), "nothing of the one that failed"


def test_a_lock_of_another_process_is_waited_for_and_seen_soon(
    database: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(tmp_path / "numbers.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
    began = time.monotonic()
    assert GroupCommit[int](database, SUBMIT).write(insert(1)) == 10
    assert time.monotonic() - began >= 0.25
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(module, "BUSY_S", 0.1)
    with pytest.raises(StoreError, match="database is locked"):
        GroupCommit[int](database, SUBMIT).write(insert(2))
    other.execute("COMMIT")
    other.close()
    assert stored(database) == [1]
