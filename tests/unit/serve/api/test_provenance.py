"""A request may ask for a signed video if the server has a certificate; the worker signs it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from certificates import make_identity
from command_line import error_lines, run
from omniavatar.errors import ConfigError
from omniavatar.serve.batch.items import Made, Outcome, Seat, Verdict, WorkerInfo
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import JobSpec, new_job_id
from omniavatar.serve.jobs.worker import JobTask, JobWorker
from omniavatar.serve.settings import ServeSettings, load_configs, load_settings
from omniavatar.types import AvatarRequest
from serve_api import Serve, voice


def test_without_a_certificate_the_field_is_refused(serve: Serve) -> None:
    reply = serve().create(provenance="true")
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["code"] == "not_available" and error["param"] == "provenance"
    assert "no certificate" in error["message"]


@pytest.mark.parametrize("asked", [True, False])
def test_with_a_certificate_the_wish_reaches_the_job(serve: Serve, tmp_path: Path, asked: bool) -> None:
    made = make_identity(tmp_path / "identity")
    server = serve(provenance_certificate=made.chain, provenance_key=made.key)
    reply = server.create(**({"provenance": "true"} if asked else {}))
    assert reply.status_code == 200
    assert server.store.get(reply.json()["id"]).spec.provenance is asked


class Watched:
    """An engine that notes what it is asked for, and then fails."""

    def __init__(self) -> None:
        self.asked: list[bool | None] = []

    def run(self, model: str, request: AvatarRequest, output: Path, *rest: Any) -> Made:
        self.asked.append(request.provenance)
        raise ConfigError("no video here")

    def device(self) -> str:
        return "none"

    def intact(self) -> bool:
        return True


@pytest.mark.parametrize("wish, expected", [(True, True), (False, None)])
def test_the_worker_passes_the_wish_on(tmp_path: Path, wish: bool, expected: bool | None) -> None:
    engine, files, id = Watched(), JobFiles(str(tmp_path / "files")), new_job_id()
    files.put(id, "input/portrait", io.BytesIO(b"x"))
    worker = JobWorker(lambda seat: engine, Seat(("cpu",)), files, str(Path.cwd()))
    assert isinstance(worker.start(), WorkerInfo)
    task = JobTask(id, JobSpec("pocket", "A man talks", "input/portrait", None, provenance=wish))
    outcome = worker.run(task)
    assert isinstance(outcome, Outcome) and outcome.verdict is Verdict.fatal
    assert engine.asked == [expected]


def test_the_settings_of_the_server_reach_every_model(tmp_path: Path) -> None:
    made = make_identity(tmp_path)
    values = {"provenance": True, "provenance_certificate": made.chain, "provenance_key": made.key}
    settings = ServeSettings(models={"a": "pocket", "b": "pocket"}, **values)
    for config in load_configs(settings).values():
        output = config.output
        assert (output.provenance, output.provenance_certificate) == (True, made.chain)
        assert output.provenance_key == made.key and output.provenance_timestamp == ""
    with pytest.raises(ConfigError, match=r"provenance_timestamp: must be a URL .*; got 'ftp://x'"):
        load_settings(options={"provenance_timestamp": "ftp://x"}, environment={})


@pytest.mark.parametrize("command", [["serve"], ["serve", "worker"]])
def test_a_server_with_an_expired_certificate_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    made = make_identity(tmp_path / "old", days=(-9, -1))
    monkeypatch.setenv("OMNIAVATAR_SERVE_PROVENANCE_CERTIFICATE", str(made.chain))
    monkeypatch.setenv("OMNIAVATAR_SERVE_PROVENANCE_KEY", str(made.key))
    monkeypatch.setenv("OMNIAVATAR_SERVE_DATA_DIR", str(tmp_path / "data"))
    result = run(*command)
    assert result.exit_code == 2
    (line,) = error_lines(result)
    assert "expired on" in line and str(made.chain) in line


def test_an_extension_of_a_signed_video_is_signed(serve: Serve, tmp_path: Path) -> None:
    made = make_identity(tmp_path / "identity")
    server = serve(provenance_certificate=made.chain, provenance_key=made.key)
    for wish in (True, False):
        id = server.create(**({"provenance": "true"} if wish else {})).json()["id"]
        server.finish()
        reply = server.client.post(
            f"/v1/videos/{id}/extensions", files={"audio_reference": ("a.wav", voice())}
        )
        assert reply.status_code == 200, reply.text
        assert server.store.get(reply.json()["id"]).spec.provenance is wish
        server.finish()
