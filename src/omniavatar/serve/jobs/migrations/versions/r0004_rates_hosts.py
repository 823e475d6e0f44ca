"""Requests a minute, and the processes that have workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "request_counts",
        sa.Column("who", sa.String(255), primary_key=True),
        sa.Column("minute", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("requests", sa.Integer, nullable=False),
    )
    op.create_table(
        "worker_hosts",
        sa.Column("name", sa.String(255), primary_key=True),
        sa.Column("workers", sa.Integer, nullable=False),
        sa.Column("ready", sa.Integer, nullable=False),
        sa.Column("seen_at", sa.Float, nullable=False),
    )
