"""The tables of the job store. A change here needs a new file in `migrations/versions/`.

Times are seconds since 1970. Everything is portable between SQLite and PostgreSQL.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("key_id", sa.String(64), nullable=False),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("progress", sa.Integer, nullable=False, server_default="0"),
    sa.Column("window", sa.Integer, nullable=False, server_default="0"),
    sa.Column("windows", sa.Integer, nullable=False, server_default="0"),
    sa.Column("step", sa.Integer, nullable=False, server_default="0"),
    sa.Column("steps", sa.Integer, nullable=False, server_default="0"),
    sa.Column("eta_seconds", sa.Float),
    sa.Column("seconds", sa.Float),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("started_at", sa.Float),
    sa.Column("completed_at", sa.Float),
    sa.Column("expires_at", sa.Float),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("resumed_windows", sa.Integer, nullable=False, server_default="0"),
    sa.Column("worker", sa.String(255)),
    sa.Column("output", sa.String(255)),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("lease_until", sa.Float),
    sa.Column("not_before", sa.Float, nullable=False, server_default="0"),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("claimed_window", sa.Integer, nullable=False, server_default="0"),
    sa.Column("last_event", sa.Integer, nullable=False, server_default="0"),
    sa.Column("warnings", sa.JSON(none_as_null=True)),
    sa.UniqueConstraint("key_id", "idempotency_key", name="uq_jobs_idempotency"),
    sa.Index("ix_jobs_queue", "status", "key_id", "priority", "created_at"),
    sa.Index("ix_jobs_list", "key_id", "created_at"),
)
"""failures: attempts in a row that ended without a new window. claimed_window: finished ones at the claim.
not_before: when a retry may begin."""

events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)

turns = sa.Table(
    "key_turns",
    metadata,
    sa.Column("key_id", sa.String(64), primary_key=True),
    sa.Column("served_at", sa.Float, nullable=False, server_default="0"),
    sa.Column("most_running", sa.Integer),
)
"""When each key last got a worker, and how many of its jobs may run at the same time."""

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(255), nullable=False, unique=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("old_digest", sa.String(64)),
    sa.Column("old_until", sa.Float),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
)
"""digest: SHA-256 of the secret. old_digest: of the one before the last rotation, valid until `old_until`."""

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("job_id", sa.String(64), primary_key=True),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("next_at", sa.Float, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False, server_default="0"),
)
"""Webhooks that wait for their delivery; a row is written before its job is accepted."""

request_counts = sa.Table(
    "request_counts",
    metadata,
    sa.Column("who", sa.String(255), primary_key=True),
    sa.Column("minute", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("requests", sa.Integer, nullable=False),
)
"""Requests of the last minutes, by key or address. minute: since 1970."""

worker_hosts = sa.Table(
    "worker_hosts",
    metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("workers", sa.Integer, nullable=False),
    sa.Column("ready", sa.Integer, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),
)
"""Processes that claim jobs for workers. ready: workers with a loaded model."""
