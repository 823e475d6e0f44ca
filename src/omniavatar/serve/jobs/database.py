"""The database of the job store: SQLite in a file, or PostgreSQL by URL; its transactions and migrations.

SQLite runs in WAL mode, syncs every commit, and begins a writing transaction with `BEGIN IMMEDIATE`, so that
it never fails half-way for a lock. PostgreSQL takes an advisory lock where two writers must not overlap.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from omniavatar.config.values import expanded
from omniavatar.errors import ConfigError
from omniavatar.media.atomic import check_writable
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.tables import metadata

BUSY_S, LOOK_S = 30.0, 0.002
"""How long a transaction waits for another process that writes; how often it looks."""
CONNECT_S = 10
MIGRATE, SUBMIT, CLAIM, RATES = 0x6F61_0001, 0x6F61_0002, 0x6F61_0003, 0x6F61_0004
"""Advisory locks of PostgreSQL: one process at a time does this."""
HEAD = "0005"
"""Revision of the tables of this version: the last of `migrations/versions`."""
_FOLDER = Path(__file__).parent / "migrations"
_REVISIONS = sa.table("alembic_version", sa.column("version_num", sa.String))


class Database:
    """Connections to the job store's database.

    clock: seconds since 1970; None asks PostgreSQL, whose clock all machines share, and this machine else.
    """

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        parsed = _parsed(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = parsed.render_as_string(hide_password=True)
        self._clock = clock or (time.time if self.is_sqlite else None)
        self._one_writer = threading.Lock() if self.is_sqlite else nullcontext()
        self._engine = _sqlite(parsed) if self.is_sqlite else _postgresql(parsed)

    @classmethod
    def open(cls, url: str, clock: Callable[[], float] | None = None) -> Self:
        """A database whose tables are those of this version; older ones are migrated, by one process.

        Raises ConfigError, StoreError.
        """
        database = cls(url, clock)
        try:
            database._migrate()
        except BaseException:
            database.close()
            raise
        return database

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises StoreError."""
        with self._errors(), self._engine.connect() as connection:
            yield connection.execution_options(omniavatar_reads=True)

    @contextmanager
    def writing(self, lock: int | None = None) -> Iterator[Connection]:
        """A transaction that is committed at the end of the body, or rolled back by its error.

        lock: an advisory lock, held until the end; SQLite has one writer at a time anyway.

        Raises StoreError.
        """
        with self._errors(), self._one_writer, self._engine.begin() as connection:
            if lock is not None and not self.is_sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection

    def now(self, connection: Connection) -> float:
        if self._clock is not None:
            return self._clock()
        return float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def close(self) -> None:
        self._engine.dispose()

    def revision(self) -> str | None:
        """The revision of the tables; None for an empty database."""
        with self.reading() as connection:
            if not sa.inspect(connection).has_table(_REVISIONS.name):
                return None
            return connection.execute(sa.select(_REVISIONS.c.version_num)).scalar()

    def _migrate(self) -> None:
        if self.revision() != HEAD:
            with self.writing(MIGRATE) as connection:
                migrate(connection, self.name)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise
        except SQLAlchemyError as error:
            cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
            text = " ".join(str(cause).split())[:300]
            remedy = "check that it runs, and its address, user and password"
            if self.is_sqlite:
                remedy = "check the path, the space on its disk and its permissions"
            raise StoreError(f"{self.name}: the job database does not answer ({text}); {remedy}") from error


def migrate(connection: Connection, name: str, target: str = "head") -> None:
    """Bring the tables to the revision `target`, inside the connection's transaction.

    name: of the database, for messages.

    Raises StoreError if a newer version of this package wrote them.
    """
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    script = ScriptDirectory(str(_FOLDER))

    def upgrade(revision: Any, context: Any) -> Any:
        return script._upgrade_revs(target, revision)

    try:
        with EnvironmentContext(Config(), script, fn=upgrade) as environment:
            environment.configure(connection=connection, target_metadata=metadata)
            environment.run_migrations()
    except CommandError as error:
        raise StoreError(
            f"{name}: its tables were written by a newer version of omniavatar ({error}); update this one"
        ) from None


def _parsed(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"database: is not a URL ({error}); give sqlite:///jobs.db") from None
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError("database: names no file; give sqlite:///jobs.db")
        return parsed.set(database=str(expanded(parsed.database, "database")))
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise ConfigError(f"database: {backend} is not supported; give sqlite:///... or postgresql://...")


def _sqlite(url: sa.URL) -> Engine:
    assert url.database is not None
    check_writable(Path(url.database).absolute().parent)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S}, pool_size=20, max_overflow=40)

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # this file begins transactions, not the driver
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        if connection.get_execution_options().get("omniavatar_reads", False):
            connection.exec_driver_sql("BEGIN")
        else:
            _begin_writing(connection)

    return engine


def _begin_writing(connection: Connection) -> None:
    """Take SQLite's lock for writing. Raises SQLAlchemyError after `BUSY_S`.

    SQLite itself waits in pauses that grow to 100 ms, in which other processes overtake again and again.
    """
    raw: Any = connection.connection.dbapi_connection
    raw.execute("PRAGMA busy_timeout=0")
    try:
        ends = time.monotonic() + BUSY_S
        while time.monotonic() < ends:
            try:
                raw.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    break
            time.sleep(LOOK_S)
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # raises the error as SQLAlchemy has it
    finally:
        raw.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")


def _postgresql(url: sa.URL) -> Engine:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise StoreError(
            "database: the package psycopg is missing; pip install 'omniavatar[serve-postgres]'"
        ) from None
    settings = {
        "synchronous_commit": "on",  # an accepted job is on the disk, whatever the server's default is
        "lock_timeout": f"{BUSY_S:.0f}s",
        "idle_in_transaction_session_timeout": f"{BUSY_S:.0f}s",
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    arguments = {"connect_timeout": CONNECT_S, "options": options}
    return sa.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20, connect_args=arguments)
