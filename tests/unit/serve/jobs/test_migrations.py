"""Any database gets the tables of this version: an empty one, one of the first revision, many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from omniavatar.serve.jobs import database as module
from omniavatar.serve.jobs.database import HEAD, Database, migrate
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.keys import KeyStore
from omniavatar.serve.jobs.records import JobSpec
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.tables import jobs, metadata

SPEC = JobSpec("pocket", "a person speaks", "input/a.png", "input/b.wav")


def test_the_named_revision_is_the_last_one() -> None:
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(module.__file__).parent / "migrations"))
    assert script.get_heads() == [HEAD]


def first_revision(url: str) -> None:
    """A database as the first version of the store left it, with one job."""
    database = Database(url)
    with database.writing() as connection:
        migrate(connection, "test", "0001")
        values = {"spec": {**vars(SPEC), "settings": {}}, "request_digest": "x", "model": "pocket"}
        connection.execute(
            jobs.insert().values(
                id="video_old", key_id="key", status="queued", priority=0, created_at=1.0, **values
            )
        )
    assert database.revision() == "0001"
    database.close()


@pytest.mark.parametrize("start", ["empty", "first"])
def test_every_database_comes_to_the_tables_of_the_code(database_url: str, start: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    if start == "first":
        first_revision(database_url)
    with JobStore.open(database_url) as store:
        assert store.database.revision() == HEAD
        with store.database.reading() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, metadata) == []
        KeyStore(store.database).add("client", ["admin"])
        if start == "first":
            claim = store.claim("worker", ["pocket"], 60)
            assert claim is not None and claim.job.id == "video_old"
    with JobStore.open(database_url) as again:
        assert again.database.revision() == HEAD


@pytest.mark.parametrize("start", ["empty", "first"])
def test_openers_at_the_same_time_migrate_once(database_url: str, start: str) -> None:
    if start == "first":
        first_revision(database_url)

    def open_store(_: int) -> str | None:
        with JobStore.open(database_url) as store:
            store.submit("key", SPEC)
            return store.database.revision()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(open_store, range(6))) == [HEAD] * 6


def test_tables_of_a_newer_version_are_refused(database_url: str) -> None:
    with JobStore.open(database_url) as store, store.database.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"newer version of omniavatar.*update this one"):
        JobStore.open(database_url)


def test_a_failed_migration_leaves_the_database_as_it_was(database_url: str) -> None:
    """The second revision cannot make its table, since one of that name is there."""
    first_revision(database_url)
    database = Database(database_url)
    with database.writing() as connection:
        connection.execute(sa.text("CREATE TABLE api_keys (id INTEGER)"))
    with pytest.raises(StoreError, match="api_keys"):
        JobStore.open(database_url)
    assert database.revision() == "0001"
    with database.writing() as connection:
        connection.execute(sa.text("DROP TABLE api_keys"))
    database.close()
    with JobStore.open(database_url) as store:
        assert store.database.revision() == HEAD
