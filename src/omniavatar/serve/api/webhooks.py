"""Webhooks on completion and failure: signed (Standard Webhooks), retried, and kept in the database.

A row is written before its job is accepted and removed after the delivery, so a restart loses none. A
receiver may get one twice, with the same `webhook-id`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from standardwebhooks.webhooks import Webhook

from omniavatar.errors import OmniAvatarError
from omniavatar.serve.api.addresses import DeliveryError, Outside
from omniavatar.serve.jobs.errors import JobNotFoundError
from omniavatar.serve.jobs.records import UNFINISHED, JobRecord, JobStatus
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.tables import jobs, webhooks

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 3600.0
_LEASE = 60.0
_ORPHAN_AGE = 3600.0
_BATCH = _AT_ONCE = 16
_log = logging.getLogger("omniavatar.serve")


def secret_of(secret: str, key_id: str) -> str:
    """The signing secret of one API key (`whsec_...`), derived from the server's."""
    digest = hmac.new(secret.encode(), f"webhook:{key_id}".encode(), hashlib.sha256).digest()
    return f"whsec_{base64.b64encode(digest).decode()}"


@dataclass(frozen=True)
class SignedWebhook:
    """A signed webhook."""

    body: bytes
    headers: dict[bytes | str, bytes | str]


def signed(job: JobRecord, secret: str, now: float) -> SignedWebhook:
    """The webhook of an ended job."""
    kind = "video.completed" if job.status is JobStatus.completed else "video.failed"
    id = f"evt_{job.id}_{job.status}"
    event = {
        "id": id,
        "object": "event",
        "type": kind,
        "created_at": int(job.completed_at or now),
        "data": {"id": job.id},
    }
    body = json.dumps(event, separators=(",", ":"))
    at = datetime.fromtimestamp(int(now), UTC)
    signature = Webhook(secret_of(secret, job.key_id)).sign(id, at, body)
    headers: dict[bytes | str, bytes | str] = {
        "Content-Type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": signature,
    }
    return SignedWebhook(body.encode(), headers)


class Webhooks:
    """Delivers webhooks from a thread. Several servers may share the database."""

    def __init__(
        self,
        store: JobStore,
        outside: Outside,
        secret: str,
        tries: int,
        poll: float = 1.0,
        seconds: float = 15.0,
    ) -> None:
        self._store, self._outside, self._secret = store, outside, secret
        self._tries, self._poll, self._seconds = tries, poll, seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, job_id: str, url: str) -> None:
        """Keep the address, before the job is submitted. Raises StoreError."""
        with self._store.database.writing() as connection:
            now = self._store.database.now(connection)
            connection.execute(webhooks.insert().values(job_id=job_id, url=url, created_at=now, next_at=now))

    def forget(self, job_id: str) -> None:
        with self._store.database.writing() as connection:
            connection.execute(webhooks.delete().where(webhooks.c.job_id == job_id))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it was delivering is tried again by the next server."""
        self._stop.set()
        self._outside.interrupt()
        if self._thread is not None:
            self._thread.join(self._seconds + 5)

    def turn(self) -> int:
        """Deliver what is due; returns how many were delivered. Raises StoreError."""
        with self._store.database.reading() as connection:
            now = self._store.database.now(connection)
            ended = sa.or_(jobs.c.id.is_(None), jobs.c.status.not_in(UNFINISHED))
            query = (
                sa.select(webhooks, jobs.c.id.label("found"))
                .select_from(webhooks.outerjoin(jobs, jobs.c.id == webhooks.c.job_id))
                .where(webhooks.c.next_at <= now, ended)
                .limit(_BATCH)
            )
            rows = connection.execute(query).mappings().all()
        taken = []
        for row in rows:
            if row["found"] is None:
                if row["created_at"] < now - _ORPHAN_AGE:
                    self.forget(row["job_id"])
            elif self._take(row):
                taken.append(row)
        with ThreadPoolExecutor(_AT_ONCE, "webhook") as pool:  # one that does not answer delays no other
            return sum(pool.map(self._deliver, taken))

    def _take(self, row: sa.RowMapping) -> bool:
        """Whether this server may deliver now; others wait for the lease."""
        with self._store.database.writing() as connection:
            now = self._store.database.now(connection)
            unchanged = sa.and_(webhooks.c.job_id == row["job_id"], webhooks.c.next_at == row["next_at"])
            taken = connection.execute(
                webhooks.update().where(unchanged).values(next_at=now + _LEASE, tries=row["tries"] + 1)
            )
            return bool(taken.rowcount)

    def _deliver(self, row: sa.RowMapping) -> bool:
        id = row["job_id"]
        try:
            job = self._store.get(id)
        except JobNotFoundError:
            self.forget(id)
            return False
        with self._store.database.reading() as connection:
            now = self._store.database.now(connection)
        message = signed(job, self._secret, now)
        try:
            self._outside.post(row["url"], message.body, message.headers, self._seconds)
        except DeliveryError as error:
            tries = row["tries"] + 1
            last = tries >= self._tries
            _log.warning("webhook of %s: %s; %s", id, error, "given up" if last else "retried later")
            if last:
                self.forget(id)
            else:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1))
                with self._store.database.writing() as connection:
                    values = {"next_at": self._store.database.now(connection) + pause}
                    connection.execute(webhooks.update().where(webhooks.c.job_id == id).values(**values))
            return False
        self.forget(id)
        return True

    def _run(self) -> None:
        while not self._stop.wait(self._poll):
            try:
                self.turn()
            except OmniAvatarError as error:
                _log.error("webhooks wait: %s", error)
            except Exception:
                _log.exception("a bug in the delivery of webhooks")
