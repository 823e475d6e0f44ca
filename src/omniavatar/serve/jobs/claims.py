"""What workers do with the job store: claim a job, report, finish it, or give it back.

A claim carries the number of its attempt. Every later write checks it, so a worker that was taken for dead
can change nothing. A claim ends with its lease unless a heartbeat extends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from omniavatar.serve.jobs.database import CLAIM, Database
from omniavatar.serve.jobs.records import (
    CANCELLED,
    WORKER_LOST,
    Claim,
    Heartbeat,
    JobError,
    JobProgress,
    JobResult,
    JobStatus,
)
from omniavatar.serve.jobs.rows import change, failed_values, find, queued_values, warning_values
from omniavatar.serve.jobs.tables import jobs, turns, worker_hosts

MOST_FAILURES = 3
"""A job fails for good after this many attempts in a row that ended with an error and finished no window."""
MOST_LOSSES = 8
"""The same if its worker died: mostly that is not the job's fault, but a job may kill each worker."""
HOST_ALIVE_S = 60.0
"""A process with workers that did not report for so long is taken for dead."""
_RUNNING = jobs.c.status == JobStatus.in_progress
CANCELLED_ERROR = JobError(CANCELLED, "the job was cancelled", "cancelled_error")


class Claims:
    """The workers' side of the job store."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def claim(self, worker: str, models: Sequence[str], lease_seconds: float) -> Claim | None:
        """The next job of one of `models`, now the worker's; None if there is none.

        The key with the fewest running jobs comes first, then the one that was served longest ago. Among the
        jobs of a key, the highest priority comes first, then the oldest.

        Raises StoreError.
        """
        with self.database.reading() as connection:  # idle workers ask often, and take no lock for it
            if not _keys_in_turn(connection, models, self.database.now(connection)):
                return None
        with self.database.writing(CLAIM) as connection:
            now = self.database.now(connection)
            for key_id in _keys_in_turn(connection, models, now):
                row = _first_of(connection, key_id, models, now)
                if row is None:
                    continue
                _note_turn(connection, key_id, now)
                record = change(
                    connection,
                    row,
                    now,
                    status=JobStatus.in_progress,
                    attempt=row["attempt"] + 1,
                    worker=worker,
                    lease_until=now + lease_seconds,
                    started_at=now if row["started_at"] is None else row["started_at"],
                    claimed_window=row["window"],
                )
                return Claim(record, worker, record.attempt, lease_seconds)
        return None

    def heartbeat(self, claim: Claim, progress: JobProgress) -> Heartbeat:
        """Extend the lease and record the progress. Raises StoreError."""
        with self._held(claim) as (connection, row, now):
            if row is None:
                return Heartbeat(cancel=False, lost=True)
            change(
                connection,
                row,
                now,
                lease_until=now + claim.lease_seconds,
                progress=progress.percent,
                window=progress.window,
                windows=progress.windows,
                step=progress.step,
                steps=progress.steps,
                eta_seconds=progress.eta_seconds,
                resumed_windows=progress.resumed_windows,
                **warning_values(progress.warnings),
            )
            return Heartbeat(cancel=bool(row["cancel_requested"]), lost=False)

    def complete(self, claim: Claim, result: JobResult) -> bool:
        """Record the finished video; False if the claim is void. Raises StoreError."""
        with self._held(claim) as (connection, row, now):
            if row is not None:
                change(
                    connection,
                    row,
                    now,
                    status=JobStatus.completed,
                    progress=100,
                    window=result.windows,
                    windows=result.windows,
                    step=0,
                    eta_seconds=None,
                    seconds=result.seconds,
                    output=result.output,
                    size_bytes=result.size_bytes,
                    resumed_windows=result.resumed_windows,
                    completed_at=now,
                    expires_at=result.expires_at,
                    lease_until=None,
                    worker=None,
                    **warning_values(result.warnings),
                )
            return row is not None

    def fail(self, claim: Claim, error: JobError, *, retry: bool, pause: float = 0.0) -> bool:
        """Record that an attempt failed; False if the claim is void.

        retry: the job waits `pause` seconds and is tried again, unless `MOST_FAILURES` is reached.

        Raises StoreError.
        """
        with self._held(claim) as (connection, row, now):
            if row is not None:
                _end_attempt(connection, row, now, error, retry=retry, pause=pause)
            return row is not None

    def release(self, claim: Claim, pause: float = 0.0) -> bool:
        """Give the job back to the queue with its finished windows; False if the claim is void.

        pause: seconds before it may be claimed again.

        Raises StoreError.
        """
        with self._held(claim) as (connection, row, now):
            if row is not None and row["cancel_requested"]:
                change(connection, row, now, **failed_values(CANCELLED_ERROR, now))
            elif row is not None:
                change(connection, row, now, **queued_values(now + pause, row["failures"]))
            return row is not None

    def requeue_expired(self) -> list[str]:
        """Give the jobs back whose workers did not report in time; returns their ids. Raises StoreError."""
        with self.database.reading() as connection:  # mostly there is none, and nobody waits for the lock
            silent = sa.and_(_RUNNING, jobs.c.lease_until < self.database.now(connection))
            if connection.execute(sa.select(jobs.c.id).where(silent).limit(1)).first() is None:
                return []
        return self._requeue(lambda now: jobs.c.lease_until < now)

    def requeue_of(self, process: str) -> list[str]:
        """Give the jobs of a process back that has died; returns their ids. Raises StoreError."""
        return self._requeue(lambda now: jobs.c.worker.startswith(f"{process}/", autoescape=True))

    def processes(self) -> set[str]:
        """Names of the processes whose workers have jobs. Raises StoreError."""
        with self.database.reading() as connection:
            workers = connection.execute(sa.select(jobs.c.worker).where(_RUNNING).distinct()).scalars()
            return {worker.rpartition("/")[0] for worker in workers}

    def _requeue(self, lost: Callable[[float], sa.ColumnElement[bool]]) -> list[str]:
        """Give the running jobs back for which `lost` holds at the time it is called with."""
        with self.database.writing(CLAIM) as connection:
            now = self.database.now(connection)
            query = sa.select(jobs).where(_RUNNING, lost(now))
            rows = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
            for row in rows:
                error = JobError(
                    WORKER_LOST,
                    f"its worker died or did not answer, {MOST_LOSSES} times in a row",
                    "server_error",
                )
                _end_attempt(connection, row, now, error, retry=True, pause=0.0)
            return [row["id"] for row in rows]

    def note_host(self, name: str, workers: int, ready: int) -> None:
        """Keep how many workers a process has, and how many have a model loaded. Raises StoreError."""
        with self.database.writing() as connection:
            now = self.database.now(connection)
            values = {"workers": workers, "ready": ready, "seen_at": now}
            named = worker_hosts.c.name == name
            if not connection.execute(worker_hosts.update().where(named).values(**values)).rowcount:
                connection.execute(worker_hosts.insert().values(name=name, **values))
            connection.execute(worker_hosts.delete().where(worker_hosts.c.seen_at < now - HOST_ALIVE_S))

    def forget_host(self, name: str) -> None:
        """Raises StoreError."""
        with self.database.writing() as connection:
            connection.execute(worker_hosts.delete().where(worker_hosts.c.name == name))

    def ready_workers(self) -> int:
        """Workers with a loaded model, of all machines. Raises StoreError."""
        with self.database.reading() as connection:
            alive = worker_hosts.c.seen_at >= self.database.now(connection) - HOST_ALIVE_S
            query = sa.select(sa.func.coalesce(sa.func.sum(worker_hosts.c.ready), 0)).where(alive)
            return int(connection.execute(query).scalar_one())

    @contextmanager
    def _held(self, claim: Claim) -> Iterator[tuple[Connection, sa.RowMapping | None, float]]:
        """The locked row of the claim's job, and the time; None if the claim is void."""
        with self.database.writing() as connection:
            row = find(connection, claim.job.id, lock=True)
            held = (
                row is not None
                and row["status"] == JobStatus.in_progress
                and row["attempt"] == claim.attempt
                and row["worker"] == claim.worker
            )
            yield connection, row if held else None, self.database.now(connection)


def _keys_in_turn(connection: Connection, models: Sequence[str], now: float) -> list[str]:
    """The keys with a job that may begin now, fairest first."""
    running = (
        sa.select(jobs.c.key_id, sa.func.count().label("count"))
        .where(jobs.c.status == JobStatus.in_progress)
        .group_by(jobs.c.key_id)
        .subquery()
    )
    count = sa.func.coalesce(running.c.count, 0)
    waiting = sa.select(jobs.c.key_id).where(*_claimable(models, now)).distinct().subquery()
    query = (
        sa.select(waiting.c.key_id)
        .select_from(waiting)
        .outerjoin(running, running.c.key_id == waiting.c.key_id)
        .outerjoin(turns, turns.c.key_id == waiting.c.key_id)
        .where(sa.or_(turns.c.most_running.is_(None), count < turns.c.most_running))
        .order_by(count, sa.func.coalesce(turns.c.served_at, 0.0), waiting.c.key_id)
    )
    return list(connection.execute(query).scalars())


def _first_of(connection: Connection, key_id: str, models: Sequence[str], now: float) -> sa.RowMapping | None:
    query = (
        sa.select(jobs)
        .where(jobs.c.key_id == key_id, *_claimable(models, now))
        .order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return connection.execute(query).mappings().first()


def _claimable(models: Sequence[str], now: float) -> list[Any]:
    return [jobs.c.status == JobStatus.queued, jobs.c.model.in_(models), jobs.c.not_before <= now]


def _note_turn(connection: Connection, key_id: str, now: float) -> None:
    changed = connection.execute(turns.update().where(turns.c.key_id == key_id).values(served_at=now))
    if not changed.rowcount:
        connection.execute(turns.insert().values(key_id=key_id, served_at=now))


def _end_attempt(
    connection: Connection,
    row: sa.RowMapping,
    now: float,
    error: JobError,
    *,
    retry: bool,
    pause: float,
) -> None:
    """Queue the job again, or mark it as failed or cancelled."""
    failures = 1 if row["window"] > row["claimed_window"] else row["failures"] + 1
    if row["cancel_requested"]:
        change(connection, row, now, **failed_values(CANCELLED_ERROR, now))
    elif retry and failures < (MOST_LOSSES if error.code == WORKER_LOST else MOST_FAILURES):
        change(connection, row, now, **queued_values(now + pause, failures))
    else:
        change(connection, row, now, **failed_values(error, now))
