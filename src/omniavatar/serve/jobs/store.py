"""The job store: what was accepted is in the database before the client hears of it.

`JobStore` is what the API, the workers and the commands share, in any number of processes and machines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from omniavatar.serve.jobs.claims import CANCELLED_ERROR, Claims
from omniavatar.serve.jobs.database import SUBMIT, Database
from omniavatar.serve.jobs.errors import (
    IdempotencyConflictError,
    JobNotFoundError,
    KeyLimitError,
    QueueFullError,
)
from omniavatar.serve.jobs.group_commit import GroupCommit
from omniavatar.serve.jobs.records import (
    UNFINISHED,
    Deleted,
    EndedJob,
    JobEvent,
    JobPage,
    JobRecord,
    JobSpec,
    JobStatus,
    KeyLimits,
    new_job_id,
)
from omniavatar.serve.jobs.rows import (
    change,
    count_unfinished,
    failed_values,
    find,
    job_record,
    note_limits,
    spec_digest,
    spec_values,
)
from omniavatar.serve.jobs.tables import events, jobs

Order = Literal["asc", "desc"]
NO_LIMITS = KeyLimits()


class JobStore(Claims):
    """Jobs of all keys. Close it at the end, or use it as a context manager."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._submits: GroupCommit[tuple[JobRecord, bool]] = GroupCommit(database, SUBMIT)

    @classmethod
    def open(cls, url: str, clock: Callable[[], float] | None = None) -> Self:
        """The store at `url` (`sqlite:///path`, `postgresql://...`), made or migrated if needed.

        clock: seconds since 1970, for tests.

        Raises ConfigError, StoreError.
        """
        return cls(Database.open(url, clock))

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ping(self) -> None:
        """Raise StoreError if the database does not answer."""
        with self.database.reading() as connection:
            connection.execute(sa.select(jobs.c.id).limit(1))

    def submit(
        self,
        key_id: str,
        spec: JobSpec,
        *,
        id: str | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
        request_digest: str | None = None,
        limits: KeyLimits = NO_LIMITS,
        most_unfinished: int | None = None,
    ) -> tuple[JobRecord, bool]:
        """Accept a job; returns it, and whether it is new.

        id: under which its files lie already (`new_job_id`).
        request_digest: hash of the request with its files; a repeated `idempotency_key` must have the same.
        most_unfinished: length of the whole queue.

        Raises IdempotencyConflictError, KeyLimitError, QueueFullError, StoreError.
        """
        digest = request_digest or spec_digest(spec)
        values = {
            "id": id or new_job_id(),
            "key_id": key_id,
            "model": spec.model,
            "spec": spec_values(spec),
            "status": JobStatus.queued,
            "priority": priority,
            "idempotency_key": idempotency_key,
            "request_digest": digest,
            "last_event": 1,
        }

        def write(connection: Connection) -> tuple[JobRecord, bool]:
            if idempotency_key is not None:
                found = _idempotent(connection, key_id, idempotency_key, digest)
                if found is not None:
                    return found, False
            if limits.unfinished is not None and count_unfinished(connection, key_id) >= limits.unfinished:
                raise KeyLimitError(
                    f"this key has {limits.unfinished} unfinished jobs, its limit; wait until one ends"
                )
            if most_unfinished is not None and count_unfinished(connection, None) >= most_unfinished:
                raise QueueFullError(f"the queue is full ({most_unfinished} jobs); try again later")
            note_limits(connection, key_id, limits)
            now = self.database.now(connection)
            connection.execute(jobs.insert().values(**values, created_at=now))
            data = {"status": str(JobStatus.queued), "attempt": 0}
            connection.execute(
                events.insert().values(job_id=values["id"], sequence=1, at=now, kind="status", data=data)
            )
            job = JobRecord(
                str(values["id"]),
                key_id,
                spec,
                JobStatus.queued,
                priority,
                now,
                idempotency_key=idempotency_key,
            )
            return job, True

        return self._submits.write(write)

    def find_idempotent(self, key_id: str, idempotency_key: str, request_digest: str) -> JobRecord | None:
        """The job that this idempotency key has made. Raises IdempotencyConflictError, StoreError."""
        with self.database.reading() as connection:
            return _idempotent(connection, key_id, idempotency_key, request_digest)

    def get(self, id: str, key_id: str | None = None) -> JobRecord:
        """The job; with `key_id`, only one of that key. Raises JobNotFoundError, StoreError."""
        with self.database.reading() as connection:
            return job_record(_owned(connection, id, key_id))

    def list(
        self,
        key_id: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
        status: JobStatus | None = None,
    ) -> JobPage:
        """Jobs by the time of their creation, of one key or of all.

        after: id of the last job of the page before.

        Raises JobNotFoundError if `after` is no job of the key, StoreError.
        """
        columns = sa.tuple_(jobs.c.created_at, jobs.c.id)
        query = sa.select(jobs)
        if key_id is not None:
            query = query.where(jobs.c.key_id == key_id)
        if status is not None:
            query = query.where(jobs.c.status == status)
        with self.database.reading() as connection:
            if after is not None:
                row = _owned(connection, after, key_id)
                last = sa.tuple_(sa.literal(row["created_at"]), sa.literal(row["id"]))
                query = query.where(columns < last if order == "desc" else columns > last)
            parts = (jobs.c.created_at, jobs.c.id)
            query = query.order_by(*(part.desc() if order == "desc" else part.asc() for part in parts))
            rows = connection.execute(query.limit(limit + 1)).mappings().all()
        return JobPage(tuple(job_record(row) for row in rows[:limit]), len(rows) > limit)

    def delete(self, id: str, key_id: str | None = None) -> Deleted:
        """Remove the job, or, if a worker makes it, stop that worker; delete it again when it has stopped.

        Raises JobNotFoundError, StoreError.
        """
        with self.database.writing() as connection:
            row = _owned(connection, id, key_id, lock=True)
            if row["status"] == JobStatus.in_progress:
                change(connection, row, self.database.now(connection), cancel_requested=True)
                return Deleted.cancelling
            connection.execute(events.delete().where(events.c.job_id == id))
            connection.execute(jobs.delete().where(jobs.c.id == id))
            return Deleted.removed

    def request_cancel(self, id: str, key_id: str | None = None) -> JobRecord:
        """Cancel the job: at once if it waits, at its next step if it runs. A finished one stays.

        Raises JobNotFoundError, StoreError.
        """
        with self.database.writing() as connection:
            row = _owned(connection, id, key_id, lock=True)
            now = self.database.now(connection)
            if row["status"] == JobStatus.queued:
                return change(
                    connection, row, now, cancel_requested=True, **failed_values(CANCELLED_ERROR, now)
                )
            if row["status"] == JobStatus.in_progress:
                return change(connection, row, now, cancel_requested=True)
            return job_record(row)

    def ended(self, age: float) -> tuple[EndedJob, ...]:
        """Completed and failed jobs, the one that ended first at the front. Raises StoreError.

        age: seconds until a job expires that has no expiry.
        """
        query = sa.select(jobs).where(jobs.c.status.not_in(UNFINISHED)).order_by(jobs.c.completed_at)
        with self.database.reading() as connection:
            now = self.database.now(connection)
            rows = connection.execute(query).mappings().all()
        return tuple(EndedJob(row["id"], row["size_bytes"] or 0, _expired(row, age, now)) for row in rows)

    def expire(self, id: str, age: float) -> bool:
        """Remove an ended job whose time is over; False if it is not, or gone. `age` as for `ended`.

        Raises StoreError.
        """
        with self.database.writing() as connection:
            row = find(connection, id, lock=True)
            if row is None or not _expired(row, age, self.database.now(connection)):
                return False
            connection.execute(events.delete().where(events.c.job_id == id))
            connection.execute(jobs.delete().where(jobs.c.id == id))
            return True

    def position(self, id: str) -> int:
        """How many waiting jobs have a higher priority, or the same and are older; 0 for one that runs.

        Turns of other keys may let a job wait longer or shorter than this.

        Raises JobNotFoundError, StoreError.
        """
        with self.database.reading() as connection:
            row = _owned(connection, id, None)
            if row["status"] != JobStatus.queued:
                return 0
            older = sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(
                sa.literal(row["created_at"]), sa.literal(row["id"])
            )
            before = sa.or_(
                jobs.c.priority > row["priority"], sa.and_(jobs.c.priority == row["priority"], older)
            )
            query = sa.select(sa.func.count()).select_from(jobs)
            return int(
                connection.execute(query.where(jobs.c.status == JobStatus.queued, before)).scalar_one()
            )

    def counts(self) -> dict[JobStatus, int]:
        """Number of jobs by status. Raises StoreError."""
        query = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
        with self.database.reading() as connection:
            found = {JobStatus(status): int(count) for status, count in connection.execute(query)}
        return {status: found.get(status, 0) for status in JobStatus}

    def unfinished(self, key_id: str | None = None) -> int:
        """Jobs that wait or run; of one key, or of all. Raises StoreError."""
        with self.database.reading() as connection:
            return count_unfinished(connection, key_id)

    def events_after(self, id: str, sequence: int = 0, limit: int = 100) -> tuple[JobEvent, ...]:
        """The job's events after `sequence`, oldest first; the oldest of many are gone. Raises StoreError."""
        query = (
            sa.select(events)
            .where(events.c.job_id == id, events.c.sequence > sequence)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        with self.database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        names = [field.name for field in dataclasses.fields(JobEvent)]
        return tuple(JobEvent(**{name: row[name] for name in names}) for row in rows)


def _expired(row: sa.RowMapping, age: float, now: float) -> bool:
    if row["status"] in UNFINISHED:
        return False
    until = row["completed_at"] + age if row["expires_at"] is None else row["expires_at"]
    return bool(until <= now)


def _owned(connection: Connection, id: str, key_id: str | None, *, lock: bool = False) -> sa.RowMapping:
    row = find(connection, id, lock=lock)
    if row is None or (key_id is not None and row["key_id"] != key_id):
        raise JobNotFoundError("no job has this id; list the jobs of this key to see their ids")
    return row


def _idempotent(connection: Connection, key_id: str, idempotency_key: str, digest: str) -> JobRecord | None:
    query = sa.select(jobs).where(jobs.c.key_id == key_id, jobs.c.idempotency_key == idempotency_key)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    if row["request_digest"] != digest:
        raise IdempotencyConflictError(
            "this idempotency key was used for another request; use a new one for each request"
        )
    return job_record(row)
