"""`omniavatar serve keys`, and the keys in a server of the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from command_line import error_lines, run
from serve_api import Serve
from serve_api import empty_database as empty_database
from serve_api import serve as serve


def keys(folder: Path, *arguments: str) -> Result:
    return run("serve", "--data-dir", str(folder), "keys", *arguments)


def token(folder: Path, *arguments: str) -> str:
    result = keys(folder, *arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("oa_") and result.stdout.count("\n") == 1
    return result.stdout.strip()


def test_a_key_is_added_listed_rotated_and_revoked(tmp_path: Path, serve: Serve) -> None:
    server = serve()

    def status(token: str, method: str = "GET") -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return server.client.request(method, "/v1/videos", headers=headers).status_code

    first = token(tmp_path, "add", "one", "--scopes", "videos:read", "--requests-per-minute", "100")
    assert status(first) == 200 and status(first, "POST") == 403
    second = token(tmp_path, "rotate", "one")
    assert second != first and status(first) == 401 and status(second) == 200
    third = token(tmp_path, "rotate", "one", "--keep-seconds", "1000")
    assert status(second) == 200 and status(third) == 200
    listed = keys(tmp_path, "list")
    assert listed.stdout.startswith("one  ") and "valid  videos:read" in listed.stdout
    (row,) = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert row["name"] == "one" and row["limits"]["requests_per_minute"] == 100
    for secret in (first, second, third):
        assert secret not in listed.stdout and secret.rsplit("_", 1)[1] not in json.dumps(row)
    assert keys(tmp_path, "revoke", "one").exit_code == 0
    assert status(second) == status(third) == 401
    assert "revoked" in keys(tmp_path, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("revoke", "two"), "two: there is no valid key"),
        (("rotate", "two"), "two: there is no valid key"),
        (("add", "../x"), "1 to 64 letters"),
        (("add", "one"), "exists already"),
        (("add", "two", "--scopes", "root"), "root given; choose from"),
        (("add", "two", "--scopes", ","), "none given"),
        (("webhook-secret", "one"), "webhook_secret: is not set"),
    ],
)
def test_a_wrong_key_is_one_line(
    tmp_path: Path, empty_database: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "jobs.db").write_bytes(empty_database.read_bytes())
    token(tmp_path, "add", "one")
    result = keys(tmp_path, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert len(error_lines(result)) == 1 and words in error_lines(result)[0]
