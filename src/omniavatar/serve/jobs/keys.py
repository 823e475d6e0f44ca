"""API keys in the job store's database. Only hashes of secrets are kept; a secret is shown once.

A token is `oa_<id>_<secret>`. The secret has 256 random bits, so a plain SHA-256 cannot be guessed back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from omniavatar.serve.jobs.database import Database
from omniavatar.serve.jobs.errors import KeyNameError
from omniavatar.serve.jobs.records import KeyLimits
from omniavatar.serve.jobs.tables import api_keys

SCOPES = ("videos:read", "videos:write", "admin")
_TOKEN = re.compile(r"oa_([0-9a-f]{16})_([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret. revoked_at: seconds since 1970; None while it is valid."""

    id: str
    name: str
    scopes: frozenset[str]
    limits: KeyLimits
    created_at: float
    revoked_at: float | None


class KeyStore:
    """Keys of all clients."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str, scopes: Iterable[str], limits: KeyLimits | None = None) -> str:
        """Make a key; returns its token, which nothing can show again. Raises KeyNameError, StoreError."""
        if not _NAME.fullmatch(name):
            raise KeyNameError(
                f"key name {name!r}: must be 1 to 64 letters, digits, dots, dashes or underscores"
            )
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not set(scopes):
            raise KeyNameError(
                f"scopes: {', '.join(unknown) or 'none'} given; choose from {', '.join(SCOPES)}"
            )
        id, secret = secrets.token_hex(8), secrets.token_hex(32)
        with self._database.writing() as connection:
            values: dict[str, Any] = {
                "id": id,
                "name": name,
                "digest": _digest(secret),
                "scopes": sorted(set(scopes)),
                "limits": dataclasses.asdict(limits or KeyLimits()),
                "created_at": self._database.now(connection),
            }
            try:
                connection.execute(api_keys.insert().values(**values))
            except IntegrityError:
                raise KeyNameError(f"key {name}: exists already; choose another name, or rotate it") from None
        return f"oa_{id}_{secret}"

    def list(self) -> tuple[ApiKey, ...]:
        """All keys by name, revoked ones included. Raises StoreError."""
        with self._database.reading() as connection:
            rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.name)).mappings().all()
        return tuple(map(_key, rows))

    def any_valid(self) -> bool:
        """Whether a key exists that is not revoked. Raises StoreError."""
        return any(key.revoked_at is None for key in self.list())

    def revoke(self, name: str) -> None:
        """Make the key void at once. Raises KeyNameError, StoreError."""
        with self._database.writing() as connection:
            now = self._database.now(connection)
            self._change(connection, name, revoked_at=now, old_digest=None, old_until=None)

    def rotate(self, name: str, keep_seconds: float = 0.0) -> str:
        """Give the key a new secret; returns the token. Raises KeyNameError, StoreError.

        keep_seconds: how long the old secret stays valid too.
        """
        secret = secrets.token_hex(32)
        with self._database.writing() as connection:
            until = self._database.now(connection) + keep_seconds
            row = self._change(
                connection, name, digest=_digest(secret), old_digest=api_keys.c.digest, old_until=until
            )
        return f"oa_{row['id']}_{secret}"

    def verify(self, token: str) -> ApiKey | None:
        """The key of a token; None if it is none, or void. Raises StoreError."""
        found = _TOKEN.fullmatch(token)
        id, secret = (found[1], found[2]) if found else ("", "")
        with self._database.reading() as connection:
            query = sa.select(api_keys).where(api_keys.c.id == id, api_keys.c.revoked_at.is_(None))
            row = connection.execute(query).mappings().first()
            now = self._database.now(connection)
        digest = _digest(secret)
        valid = hmac.compare_digest(digest, _NO_DIGEST if row is None else row["digest"])
        old = _NO_DIGEST if row is None or (row["old_until"] or 0.0) <= now else row["old_digest"]
        valid |= hmac.compare_digest(digest, old or _NO_DIGEST)
        return _key(row) if row is not None and valid else None

    def _change(self, connection: sa.Connection, name: str, **values: Any) -> sa.RowMapping:
        named = sa.and_(api_keys.c.name == name, api_keys.c.revoked_at.is_(None))
        if not connection.execute(api_keys.update().where(named).values(**values)).rowcount:
            raise KeyNameError(f"key {name}: there is no valid key of this name; list the keys")
        return connection.execute(sa.select(api_keys).where(api_keys.c.name == name)).mappings().one()


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: sa.RowMapping) -> ApiKey:
    values = {name: row[name] for name in ("id", "name", "created_at", "revoked_at")}
    return ApiKey(scopes=frozenset(row["scopes"]), limits=KeyLimits(**row["limits"]), **values)
