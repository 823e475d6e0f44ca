"""API keys, on both databases."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from omniavatar.serve.jobs.errors import KeyNameError
from omniavatar.serve.jobs.keys import KeyStore
from omniavatar.serve.jobs.records import KeyLimits
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.tables import api_keys


@pytest.fixture
def keys(store: JobStore) -> KeyStore:
    return KeyStore(store.database)


def test_a_token_is_its_key_and_only_a_hash_is_kept(store: JobStore, keys: KeyStore) -> None:
    assert not keys.any_valid()
    token = keys.add("client", ["videos:read", "videos:write"], KeyLimits(unfinished=4))
    key = keys.verify(token)
    assert key is not None and key in keys.list()
    assert (key.name, key.scopes, key.limits.unfinished) == ("client", {"videos:read", "videos:write"}, 4)
    with store.database.reading() as connection:
        row = connection.execute(sa.select(api_keys)).one()
    secret = token.rsplit("_", 1)[1]
    assert not any(secret in str(value) for value in row) and secret not in repr(key)


def test_another_token_is_no_key(keys: KeyStore) -> None:
    token = keys.add("client", ["admin"])
    id = token.split("_")[1]
    wrong = [
        "",
        "oa_",
        token[:-1],
        token + "0",
        token.upper(),
        f"oa_{id}_{'0' * 64}",
        f"oa_{'0' * 16}_{'0' * 64}",
    ]
    wrong += [f"oa_{id}_{token[-63:]}g", f" {token}", f"{token}\n", "oa_' OR 1=1 --_x"]
    assert [keys.verify(each) for each in wrong] == [None] * len(wrong)


def test_a_revoked_key_is_void_at_once(keys: KeyStore) -> None:
    token = keys.add("client", ["admin"])
    rotated = keys.rotate("client", keep_seconds=100)
    keys.revoke("client")
    assert keys.verify(token) is None and keys.verify(rotated) is None
    assert keys.list()[0].revoked_at is not None and not keys.any_valid()
    for action in (keys.revoke, keys.rotate):
        with pytest.raises(KeyNameError, match="there is no valid key of this name"):
            action("client")


@pytest.mark.parametrize("keep", [0.0, 60.0])
def test_a_rotated_key_has_a_new_secret_and_keeps_the_old_one_for_a_while(
    keys: KeyStore, clock, keep: float
) -> None:
    old = keys.add("client", ["admin"])
    new = keys.rotate("client", keep_seconds=keep)
    assert keys.verify(new) is not None and new != old
    assert (keys.verify(old) is not None) == bool(keep)
    clock.time += 60
    assert keys.verify(old) is None and keys.verify(new) is not None


def test_a_name_is_used_once_and_scopes_are_known(keys: KeyStore) -> None:
    keys.add("client", ["admin"])
    with pytest.raises(KeyNameError, match="key client: exists already"):
        keys.add("client", ["admin"])
    with pytest.raises(KeyNameError, match="choose from videos:read, videos:write, admin"):
        keys.add("other", ["root"])
    with pytest.raises(KeyNameError, match="choose from"):
        keys.add("other", [])
    for name in ("", "a b", "../x", "x" * 65):
        with pytest.raises(KeyNameError, match="key name"):
            keys.add(name, ["admin"])
    assert [key.name for key in keys.list()] == ["client"]
