"""Traces across processes, logs with request ids, metrics that move: what operators see."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from job_driver import RULES
from job_stub import StubJobEngines
from media_files import segments
from omniavatar.config.load import load_config
from omniavatar.errors import ConfigError
from omniavatar.serve.api.metrics import Metrics
from omniavatar.serve.api.operations import create_worker_app
from omniavatar.serve.batch.items import Seat
from omniavatar.serve.jobs.engines import JobEngines
from omniavatar.serve.jobs.process_crew import ProcessCrew
from omniavatar.serve.jobs.records import JobError, JobSpec, JobStatus
from omniavatar.serve.jobs.rows import spec_digest
from omniavatar.serve.jobs.workers import WorkerRules, Workers
from omniavatar.serve.settings import ServeSettings, load_settings
from otlp import collecting
from processes import start as start_process
from serve_api import Serve, Server

WAIT_S = 60.0


@contextmanager
def workers(server: Server, folder: Path, traces: str = "", level: str | None = None) -> Iterator[None]:
    """Workers of a stub engine, in their own processes."""
    (folder / "notes").mkdir()
    engines = StubJobEngines(folder / "notes", segments(folder, [9])[0], windows=3, log_level=level)
    crew = ProcessCrew(1, engines, server.files)
    made = Workers(server.store, server.files, lambda: crew, ["pocket"], WorkerRules(**RULES), traces=traces)
    made.start()
    try:
        yield
    finally:
        made.stop()
        assert made.join(WAIT_S)


def ended(server: Server, id: str) -> JobStatus:
    end = time.monotonic() + WAIT_S
    while server.store.get(id).status in (JobStatus.queued, JobStatus.in_progress):
        assert time.monotonic() < end
        time.sleep(0.02)
    return server.store.get(id).status


@pytest.mark.slow
def test_one_trace_goes_from_the_request_to_the_windows_in_another_process(
    serve: Serve, tmp_path: Path
) -> None:
    client_trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with collecting() as collector:
        server = serve(otlp_endpoint=collector.endpoint)
        header = {"traceparent": f"00-{client_trace}-00f067aa0ba902b7-01"}
        id = server.create(headers=header).json()["id"]
        bad = server.create(prompt="bad picture").json()["id"]
        with workers(server, tmp_path, collector.endpoint):
            assert ended(server, id) is JobStatus.completed
            assert ended(server, bad) is JobStatus.failed
            windows = [span for span in collector.named("window", 3) if span.trace == client_trace]
            requests = collector.named("POST /v1/videos", 2)
            queue, worker, video = (collector.named(name, 2) for name in ("queue", "worker", "video"))
        assert len(requests) == 2
        (request,) = (span for span in requests if span.trace == client_trace)
        assert request.parent == "00f067aa0ba902b7"
        own = {span.name: span for span in (*queue, *worker, *video) if span.trace == client_trace}
        assert own["queue"].parent == own["worker"].parent == request.id
        assert own["video"].parent == own["worker"].id
        assert {span.parent for span in windows} == {own["video"].id}
        assert [span.values["video.window"] for span in windows] == [0, 1, 2]
        assert own["queue"].values["video.job"] == id
        processes = {name: span.resource["process.pid"] for name, span in own.items()}
        assert processes["video"] != processes["worker"] == request.resource["process.pid"]
        assert {span.resource["service.name"] for span in collector.spans} == {"omniavatar"}
        assert own["queue"].ended <= own["worker"].began + 0.01
        assert own["worker"].began <= own["video"].began <= own["video"].ended <= own["worker"].ended
        failed = [span for span in (*worker, *video) if span.failed]
        assert {span.name for span in failed} == {"worker", "video"}
        assert len({span.trace for span in failed}) == 1 and failed[0].trace != client_trace


@pytest.mark.slow
def test_a_server_imports_what_it_needs_and_nothing_of_opentelemetry(empty_database: Path) -> None:
    program = (
        "import sys, omniavatar.serve.jobs.workers, omniavatar.serve.jobs.process\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
        "import omniavatar.serve.api.app  # FastAPI looks for the API of OpenTelemetry by itself\n"
        "omniavatar.serve.api.app.JobStore.open(sys.argv[1]).close()\n"
        "assert not {'av', 'alembic', 'torch'} & set(sys.modules), 'a restart would wait for them'\n"
        "parts = ('opentelemetry.sdk', 'opentelemetry.exporter', 'opentelemetry.instrumentation')\n"
        "assert not [name for name in sys.modules if name.startswith(parts)]\n"
        "from omniavatar.serve.jobs.tracing import provider_of\n"
        "provider_of('http://127.0.0.1:9')\n"
        "assert 'opentelemetry.sdk.trace' in sys.modules"
    )
    command = [sys.executable, "-c", program, f"sqlite:///{empty_database}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_job_without_a_collector_has_no_trace_but_a_request_id(serve: Serve) -> None:
    server = serve()
    reply = server.create()
    origin = server.store.get(reply.json()["id"]).spec.origin
    assert origin == {"request_id": reply.headers["x-request-id"]}
    spec = JobSpec("pocket", "a", "input/portrait", None)
    other = JobSpec("pocket", "a", "input/portrait", None, origin={"request_id": "req_1"})
    assert spec_digest(spec) == spec_digest(other), "a repeated request is the same request"


@pytest.mark.slow
def test_the_request_id_goes_through_to_the_log_of_the_worker(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The collector of its traces is away, which delays nothing."""
    away = "http://127.0.0.1:9/v1/traces"
    server = serve(otlp_endpoint=away)
    replies = [server.create(prompt=prompt) for prompt in ("a man talks", "bad picture")]
    with workers(server, tmp_path, away, level="debug"):
        states = [ended(server, reply.json()["id"]) for reply in replies]
    assert states == [JobStatus.completed, JobStatus.failed]
    text = capfd.readouterr().err
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
    for reply, last in zip(replies, ("is made", "ends: image: is broken; give another"), strict=True):
        own = [line for line in lines if line["request_id"] == reply.headers["x-request-id"]]
        assert {line["job"] for line in own} == {reply.json()["id"]}
        assert own[0]["message"].endswith("begins") and own[-1]["message"].endswith(last)
        assert own[-1]["verdict"] in ("done", "failed") and own[-1]["seconds"] >= 0
    assert sum("window" in line for line in lines) == 3


def test_workers_of_a_real_engine_log_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    JobEngines({"pocket": load_config("pocket").config}, log_level="info")(Seat(("cpu",)))
    logging.getLogger("omniavatar.serve").info("a line")
    assert json.loads(capfd.readouterr().err.splitlines()[-1])["message"] == "a line"


Numbers = dict[str, float]


def numbers(client: TestClient) -> Numbers:
    """Every sample of /metrics, as the parser of prometheus_client reads it."""
    reply = client.get("/metrics")
    assert reply.status_code == 200
    found: Numbers = {}
    for family in text_string_to_metric_families(reply.text):
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_every_metric_exists_and_moves(serve: Serve) -> None:
    server, used = serve(), [10]
    metrics = Metrics(server.store, lambda: [(0, used[0], 100)])
    app = create_worker_app(ServeSettings(), server.store, server.keys, lambda: True, metrics)
    client = TestClient(app, base_url="http://127.0.0.1")
    before = numbers(client)
    server.create()
    server.create()
    claim = server.claim()
    moved = numbers(client)
    assert before["omniavatar_jobs{status=queued}"] == before["omniavatar_jobs{status=in_progress}"] == 0
    assert moved["omniavatar_jobs{status=queued}"] == moved["omniavatar_jobs{status=in_progress}"] == 1
    server.finish(claim)
    metrics.ended_id(claim.job.id)
    failing = server.claim()
    server.store.fail(failing, JobError("input", "no", "invalid_request_error"), retry=False, pause=0.0)
    metrics.ended_id(failing.job.id)
    metrics.ended_id("video_" + 32 * "0")  # deleted meanwhile
    used[0] = 60
    after = numbers(client)
    assert after["omniavatar_jobs{status=completed}"] == after["omniavatar_jobs{status=failed}"] == 1
    assert after["omniavatar_jobs_ended_total{status=completed}"] == 1
    assert after["omniavatar_jobs_ended_total{status=failed}"] == 1
    assert after["omniavatar_errors_total{kind=input}"] == 1
    assert "omniavatar_errors_total{kind=input}" not in moved
    assert after["omniavatar_window_seconds_count{model=pocket}"] == 1
    assert after["omniavatar_window_seconds_sum{model=pocket}"] > 0
    assert (moved["omniavatar_gpu_memory_bytes{gpu=0,kind=used}"], used) == (10, [60])
    assert after["omniavatar_gpu_memory_bytes{gpu=0,kind=used}"] == 60
    assert after["omniavatar_gpu_memory_bytes{gpu=0,kind=total}"] == 100
    name = "omniavatar_request_seconds_count{method=GET,route=/metrics,status=200}"
    assert after[name] > moved[name] > 0


def test_a_worker_answers_health_ready_and_metrics_only(serve: Serve) -> None:
    server = serve()
    state = {"ready": False}
    app = create_worker_app(
        ServeSettings(), server.store, server.keys, lambda: state["ready"], Metrics(server.store)
    )
    client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").status_code == 503
    state["ready"] = True
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/v1/videos").status_code == 404
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
    token = server.keys.add("reader", ["videos:read"])
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code == 403


def test_secrets_come_from_files_and_are_never_printed(tmp_path: Path) -> None:
    secret, url = tmp_path / "secret", tmp_path / "url"
    secret.write_text("0123456789abcdef" * 2 + "\n")
    url.write_text("postgresql://avatar:pass-word@db:5432/jobs\n")
    environment = {
        "OMNIAVATAR_SERVE_WEBHOOK_SECRET_FILE": str(secret),
        "OMNIAVATAR_SERVE_DATABASE_FILE": str(url),
    }
    loaded = load_settings(environment=environment)
    assert loaded.settings.webhook_secret == "0123456789abcdef" * 2
    assert loaded.settings.database_url == "postgresql://avatar:pass-word@db:5432/jobs"
    rows = {name: (value, origin) for name, value, origin in loaded.rows()}
    assert rows["webhook_secret"] == ("(hidden)", f"OMNIAVATAR_SERVE_WEBHOOK_SECRET_FILE ({secret})")
    assert rows["database"][0] == "postgresql://avatar:(hidden)@db:5432/jobs"
    assert "pass-word" not in str(rows)
    with pytest.raises(ConfigError, match=r"_DATABASE_FILE: .*no such file"):
        load_settings(environment={"OMNIAVATAR_SERVE_DATABASE_FILE": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match="is set too"):
        load_settings(environment={**environment, "OMNIAVATAR_SERVE_DATABASE": "sqlite:///a.db"})
    with pytest.raises(ConfigError, match="otlp_endpoint: must be a URL"):
        load_settings(environment={"OMNIAVATAR_SERVE_OTLP_ENDPOINT": "collector:4318"})


@pytest.mark.slow
def test_sigterm_ends_what_a_server_has_still_to_do(tmp_path: Path) -> None:
    """uvicorn raises the signal again when it has ended, which must not kill what follows: the draining."""
    command = [sys.executable, "-m", "omniavatar.cli", "serve", "--api-only", "--port", "0"]
    process = start_process([*command, "--data-dir", str(tmp_path)], stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Uvicorn running" in line:
            break
    process.terminate()
    lines.append(process.stderr.read())
    assert process.wait(WAIT_S) == 0, "".join(lines)
