"""Keys, hosts, origins, limits, metrics: who may do what, and how much."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from omniavatar.errors import ConfigError
from omniavatar.serve.api.app import check_binding
from omniavatar.serve.jobs.logs import JsonFormatter
from omniavatar.serve.jobs.records import KeyLimits
from omniavatar.serve.settings import ServeSettings, load_settings
from serve_api import FILES, Serve


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_key_sees_its_own_jobs_only(serve: Serve) -> None:
    server = serve()
    one, two = (server.keys.add(name, ["videos:read", "videos:write"]) for name in ("one", "two"))
    refused = server.client.get("/v1/videos")
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    id = server.create(headers=bearer(one)).json()["id"]
    assert server.client.get(f"/v1/videos/{id}", headers=bearer(one)).status_code == 200
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events")):
        reply = server.client.request(method, f"/v1/videos/{id}{path}", headers=bearer(two))
        assert reply.status_code == 404, (method, path)
    assert (
        server.client.post(f"/v1/videos/{id}/extensions", headers=bearer(two), files=FILES).status_code == 404
    )
    assert server.client.get("/v1/videos", headers=bearer(two)).json()["data"] == []
    server.keys.revoke("one")
    assert server.client.get(f"/v1/videos/{id}", headers=bearer(one)).status_code == 401
    server.keys.revoke("two")
    assert server.client.get("/v1/videos").status_code == 401, "revoking the last key opens nothing"


def test_scopes_and_limits_of_a_key(serve: Serve) -> None:
    server = serve()
    reader = server.keys.add("reader", ["videos:read"])
    writer = server.keys.add("writer", ["videos:read", "videos:write"], KeyLimits(unfinished=1))
    slow = server.keys.add("slow", ["videos:read"], KeyLimits(requests_per_minute=2))
    denied = server.create(headers=bearer(reader))
    assert denied.status_code == 403 and "videos:write" in denied.json()["error"]["message"]
    assert server.client.get("/metrics", headers=bearer(reader)).status_code == 403
    assert server.create(headers=bearer(writer)).status_code == 200
    limited = server.create(headers=bearer(writer))
    assert limited.status_code == 429 and limited.json()["error"]["code"] == "key_limit"
    statuses = [server.client.get("/v1/videos", headers=bearer(slow)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "a b"}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "https://page.example"}, 200),
    ],
)
def test_hosts_and_origins(serve: Serve, headers: dict[str, str], status: int) -> None:
    server = serve(cors_origins=("https://page.example",))
    reply = server.client.get("/v1/models", headers=headers)
    assert reply.status_code == status, reply.text
    allowed = reply.headers.get("access-control-allow-origin")
    assert allowed == ("https://page.example" if "page" in headers.get("Origin", "") else None)


def test_no_page_of_another_origin_is_allowed_by_default(serve: Serve) -> None:
    server = serve()
    assert server.create(headers={"Origin": "https://page.example"}).status_code == 403
    assert "access-control-allow-origin" not in server.client.get("/v1/models").headers


def test_bytes_are_counted_while_they_arrive(serve: Serve) -> None:
    server = serve(upload_bytes=20_000)
    by_header = server.client.post("/v1/videos", content=b"x" * 30_000)
    assert by_header.status_code == 413

    def blocks() -> object:
        yield b'{"prompt": "'
        for _ in range(10_000):
            yield b"x" * 1000

    chunked = server.client.post("/v1/videos", content=blocks(), headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "too_large"
    body = b'{"prompt": "' + b"x" * 15_000 + b'"}'
    client = serve(uploads_bytes=10_000).client
    together = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert together.status_code == 503 and together.json()["error"]["code"] == "busy"
    assert together.headers["retry-after"] and client.get("/v1/videos").status_code == 200


def test_the_queue_has_a_length(serve: Serve) -> None:
    server = serve(queue_length=1)
    assert server.create().status_code == 200
    full = server.create()
    assert full.status_code == 503 and full.json()["error"]["code"] == "queue_full"
    assert full.headers["retry-after"] and len(server.folders) == 1


@pytest.mark.parametrize("id", ["..%2f..%2fetc", "video_%2e%2e", "video_" + "g" * 32, "video_" + "0" * 32])
def test_ids_are_no_paths(serve: Serve, id: str) -> None:
    server = serve()
    for path in (f"/v1/videos/{id}", f"/v1/videos/{id}/content"):
        reply = server.client.get(path)
        assert reply.status_code in (400, 404) and "error" in reply.json()


def test_a_bug_shows_no_details(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()

    @server.app.get("/boom")
    def boom() -> None:
        raise RuntimeError("secret path /home/x")

    reply = server.client.get("/boom")
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "server_error"
    assert "secret path" in caplog.text and reply.headers["x-request-id"].startswith("req_")
    assert 'route="/boom",status="500"' in server.client.get("/metrics").text


def test_a_lost_database_shows_no_address(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    server.store.close()
    for path in tmp_path.glob("jobs.db*"):
        path.unlink()
    reply = server.client.get("/v1/videos")
    assert reply.status_code == 503 and str(tmp_path) not in reply.text
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/ready").status_code == 503


def test_health_ready_and_metrics(serve: Serve) -> None:
    server = serve(ready=False)
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").status_code == 503
    server.create()
    server.create(seed="x")
    text = server.client.get("/metrics").text
    assert 'omniavatar_jobs{status="queued"} 1.0' in text
    assert 'omniavatar_errors_total{kind="invalid_value"} 1.0' in text
    assert 'route="/v1/videos",status="200"' in text
    assert serve().client.get("/ready").json() == {"status": "ready"}


def test_logs_are_json_with_request_ids(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve()
    with caplog.at_level(logging.INFO):
        id = server.create().json()["id"]
    audits = [record for record in caplog.records if record.name == "omniavatar.serve.api.access"]
    line = json.loads(JsonFormatter().format(audits[0]))
    assert (line["action"], line["job"], line["key"]) == ("submit", id, "local")
    access = [record for record in caplog.records if record.name == "omniavatar.serve.api.guard"]
    assert json.loads(JsonFormatter().format(access[0]))["status"] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "server.example"])
def test_another_address_needs_keys(serve: Serve, host: str) -> None:
    server = serve()
    with pytest.raises(ConfigError, match="keys add"):
        check_binding(ServeSettings(host=host), server.keys)
    check_binding(ServeSettings(host=host, insecure=True), server.keys)
    check_binding(ServeSettings(), server.keys)
    server.keys.add("one", ["videos:read"])
    check_binding(ServeSettings(host=host), server.keys)


def test_every_setting_knows_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("port: 1\nworkers: 2\nmodels: {a: pocket}\n")
    environment = {"OMNIAVATAR_SERVE_PORT": "2", "OMNIAVATAR_SERVE_WEBHOOK_SECRET": "s" * 32}
    loaded = load_settings(path, {"port": 3, "host": None}, environment)
    found = {name: (value, origin) for name, value, origin in loaded.rows()}
    assert found["port"] == (3, "--port")
    assert found["workers"] == (2, f"{path}:2")
    assert found["webhook_secret"] == ("(hidden)", "OMNIAVATAR_SERVE_WEBHOOK_SECRET")
    assert found["host"] == ("127.0.0.1", "default")


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("prot: 1", {}, "did you mean port"),
        ("port: x", {}, "serve.yaml:1: port"),
        ("", {"OMNIAVATAR_SERVE_PORT": "99999"}, "OMNIAVATAR_SERVE_PORT: port"),
        ("", {"OMNIAVATAR_SERVE_WEBHOOK_SECRET": "short"}, "32 or more"),
        ("models: {}", {}, "names no model"),
        ("models: {../x: pocket}", {}, "no model name"),
        ("cors_origins: ['*']", {}, "no origin"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, environment: dict[str, str], words: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {}, environment)
    assert words in str(caught.value) and "short" not in str(caught.value).replace("shorter", "")
