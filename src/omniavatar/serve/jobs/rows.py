"""Jobs as rows of the database, and back; what each change writes, with its event."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from omniavatar.serve.jobs.records import (
    UNFINISHED,
    JobError,
    JobRecord,
    JobSpec,
    JobStatus,
    JobWarning,
    KeyLimits,
)
from omniavatar.serve.jobs.tables import events, jobs, turns

MOST_EVENTS = 200
"""Events kept of one job; the oldest are deleted."""
_MADE = ("spec", "status", "error", "warnings")
_PLAIN = [field.name for field in dataclasses.fields(JobRecord) if field.name not in _MADE]


def job_record(row: sa.RowMapping) -> JobRecord:
    spec = dict(row["spec"])
    spec["size"] = None if spec["size"] is None else tuple(spec["size"])
    error = None if row["error"] is None else JobError(**row["error"])
    warnings = tuple(JobWarning(**each) for each in row["warnings"] or ())
    values = {name: row[name] for name in _PLAIN}
    status = JobStatus(row["status"])
    return JobRecord(spec=JobSpec(**spec), status=status, error=error, warnings=warnings, **values)


def spec_values(spec: JobSpec) -> dict[str, Any]:
    values = dataclasses.asdict(spec)
    size = None if spec.size is None else list(spec.size)
    return {**values, "size": size, "settings": dict(spec.settings), "origin": dict(spec.origin)}


def spec_digest(spec: JobSpec) -> str:
    """The same for the same request, whenever it comes."""
    values = {name: value for name, value in spec_values(spec).items() if name != "origin"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def find(connection: Connection, job_id: str, *, lock: bool = False) -> sa.RowMapping | None:
    """The job's row. lock: no other transaction changes it before this one ends (SQLite has one writer)."""
    query = sa.select(jobs).where(jobs.c.id == job_id)
    return connection.execute(query.with_for_update() if lock else query).mappings().first()


def change(connection: Connection, row: sa.RowMapping, now: float, **values: Any) -> JobRecord:
    """Write `values` into the job's row, and an event if its status or progress changes; returns the job."""
    new = {**row, **values}
    if new["status"] != row["status"] or new["attempt"] != row["attempt"]:
        data = {"status": str(new["status"]), "attempt": new["attempt"]}
        values["last_event"] = add_event(connection, row, now, "status", data)
    elif any(new[name] != row[name] for name in ("window", "windows", "step", "steps")):
        names = ("window", "windows", "step", "steps", "progress", "eta_seconds")
        values["last_event"] = add_event(
            connection, row, now, "progress", {name: new[name] for name in names}
        )
    connection.execute(jobs.update().where(jobs.c.id == row["id"]).values(**values))
    found = find(connection, row["id"])
    assert found is not None
    return job_record(found)


def add_event(connection: Connection, row: sa.RowMapping, now: float, kind: str, data: dict[str, Any]) -> int:
    """Add an event and delete the oldest; returns its sequence number."""
    sequence = int(row["last_event"]) + 1
    connection.execute(
        events.insert().values(job_id=row["id"], sequence=sequence, at=now, kind=kind, data=data)
    )
    if sequence > MOST_EVENTS:
        old = events.c.sequence <= sequence - MOST_EVENTS
        connection.execute(events.delete().where(events.c.job_id == row["id"], old))
    return sequence


def warning_values(warnings: tuple[JobWarning, ...]) -> dict[str, Any]:
    """What the row of a job with new warnings holds; nothing is changed without them."""
    return {"warnings": [dataclasses.asdict(each) for each in warnings]} if warnings else {}


def failed_values(error: JobError, now: float) -> dict[str, Any]:
    """What the row of a failed job holds."""
    return {
        "status": JobStatus.failed,
        "error": dataclasses.asdict(error),
        "completed_at": now,
        "eta_seconds": None,
        "lease_until": None,
        "worker": None,
    }


def queued_values(not_before: float, failures: int) -> dict[str, Any]:
    """What the row of a job holds that waits again; its finished windows are kept."""
    return {
        "status": JobStatus.queued,
        "not_before": not_before,
        "failures": failures,
        "step": 0,
        "eta_seconds": None,
        "lease_until": None,
        "worker": None,
    }


def count_unfinished(connection: Connection, key_id: str | None) -> int:
    """Jobs that wait or run; of one key, or of all."""
    query = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status.in_(UNFINISHED))
    if key_id is not None:
        query = query.where(jobs.c.key_id == key_id)
    return int(connection.execute(query).scalar_one())


def note_limits(connection: Connection, key_id: str, limits: KeyLimits) -> None:
    """Keep how many jobs of the key may run at the same time, for those who claim."""
    values = {"most_running": limits.running}
    changed = connection.execute(turns.update().where(turns.c.key_id == key_id).values(**values))
    if not changed.rowcount:
        connection.execute(turns.insert().values(key_id=key_id, **values))
