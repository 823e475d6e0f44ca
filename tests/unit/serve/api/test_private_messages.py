"""No client reads a path or an address of the server, wherever a message comes from."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from omniavatar.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NumbersError,
    OmniAvatarError,
    OutputError,
    ResourceError,
    TargetError,
    for_clients,
)
from omniavatar.serve.api import errors
from omniavatar.serve.jobs.claims import MOST_LOSSES
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.records import WORKER_LOST, JobError
from omniavatar.serve.jobs.worker import code_of
from serve_api import Serve, Server

CERTIFICATE = "provenance_certificate /etc/omniavatar/chain.pem: expired on 2026-11-01; give a new one"
WEIGHTS = "/models/My Weights/dit.safetensors: not found; `omniavatar download` fetches it"
SECRETS = ("/etc", "chain.pem", "/models", "Weights/", "/srv", "10.1.2.3", "C:\\", "node7")


def failed(server: Server, error: JobError) -> str:
    """Id of a job that failed with this error."""
    id = str(server.create().json()["id"])
    assert server.store.fail(server.claim(), error, retry=False)
    return id


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (ConfigError, CERTIFICATE),
        (CheckpointError, WEIGHTS),
        (OutputError, "cannot write /srv/my videos/out.mp4: the disk is full; free some space"),
        (TargetError, "/srv/x.mp4: is not ours"),
        (ResourceError, "Ray at 10.1.2.3:6379 does not answer; start it"),
        (InputError, "image C:\\data\\x.png: is broken; give another"),
        (NumbersError, "/srv/x.mp4: window 3 has no finite numbers"),
    ],
)
def test_a_failed_video_names_no_path(serve: Serve, kind: type[OmniAvatarError], text: str) -> None:
    server = serve()
    id = failed(server, JobError(code_of(kind.__name__), text, "server_error"))
    for path in (f"/v1/videos/{id}", "/v1/videos", f"/v1/videos/{id}/content", f"/v1/videos/{id}/events"):
        reply = server.client.get(path)
        assert not [secret for secret in SECRETS if secret in reply.text], reply.text
    shown = server.client.get(f"/v1/videos/{id}").json()["error"]
    assert shown["code"] == code_of(kind.__name__) and len(shown["message"]) > 20
    stored = server.store.get(id).error
    assert stored is not None and stored.message == text, "who runs the server can read it"


def test_the_client_s_own_mistakes_stay_readable(serve: Serve) -> None:
    server = serve()
    id = str(server.create().json()["id"])
    path = server.files.local(id, "input/portrait")
    text = f"image {path}: has 3 x 3 pixels, too few; give a larger one"
    server.store.fail(server.claim(), JobError("input", text, "invalid_request_error"), retry=False)
    shown = server.client.get(f"/v1/videos/{id}").json()["error"]["message"]
    assert shown == "image input_reference: has 3 x 3 pixels, too few; give a larger one"


def test_a_job_whose_workers_died_names_no_machine(serve: Serve) -> None:
    now = [1000.0]
    server = serve(clock=lambda: now[0])
    id = str(server.create().json()["id"])
    for _ in range(MOST_LOSSES):
        assert server.store.claim("node7:4711:abc/0", ["pocket"], 1.0) is not None
        now[0] += 5
        server.store.requeue_expired()
    ray = failed(server, JobError(WORKER_LOST, "the actor on node7 (ip 10.1.2.3) died", "server_error"))
    for each in (id, ray):
        error = server.client.get(f"/v1/videos/{each}").json()["error"]
        assert error["code"] == WORKER_LOST and "died" in error["message"]
        assert not [secret for secret in SECRETS if secret in error["message"]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError(CERTIFICATE), 503),
        (InputError("/srv/portrait.png: cannot be used: permission denied; check it"), 503),
        (CheckpointError(WEIGHTS), 503),
        (StoreError("postgresql://10.1.2.3/jobs: does not answer"), 503),
        (OutputError("cannot write /srv/x: the disk is full"), 507),
        (OSError(errno.EACCES, "Permission denied", "/srv/portrait.png"), 503),
        (OSError(errno.ENOSPC, "No space left", "/srv/portrait.png"), 507),
        (ValueError("/srv/secret"), 500),
        (ConfigError("num_steps: must be below 100"), 400),
        (InputError("image: has 3 x 3 pixels, too few; give a larger one"), 400),
    ],
)
def test_an_error_of_a_route_names_no_path(
    error: Exception, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "omniavatar.serve"):
        found = errors.as_api_error(error)
    assert found.status == status
    assert not [secret for secret in SECRETS if secret in str(found)], found
    if status == 400:
        assert str(found) == str(error)
    else:
        assert caplog.records, "the log has it"


@pytest.mark.parametrize(
    "error",
    [ConfigError(CERTIFICATE), CheckpointError(WEIGHTS), ResourceError("GPU 3 of node7"), TargetError("/x")],
)
def test_an_answer_and_a_failed_video_have_the_same_words(serve: Serve, error: OmniAvatarError) -> None:
    server, kind = serve(), type(error)
    id = failed(server, JobError(code_of(kind.__name__), str(error), "server_error"))
    shown = server.client.get(f"/v1/videos/{id}").json()["error"]["message"]
    assert shown == str(errors.as_api_error(error)) == for_clients(kind, str(error)) != str(error)


def test_an_expired_certificate_of_a_running_server_is_not_shown() -> None:
    app = FastAPI()
    errors.install(app)

    @app.get("/")
    def fails() -> None:
        raise ConfigError(CERTIFICATE)

    reply = TestClient(app).get("/")
    assert reply.status_code == 503 and str(Path("/etc")) not in reply.text
