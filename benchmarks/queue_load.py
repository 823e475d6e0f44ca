"""What the server does while ten times as many videos are asked for as its workers can make (stub engine).

The server, its queue and its worker processes are the real ones; the engine only waits. First the capacity is
measured, with a queue that never empties. Then requests come at a fixed rate, whatever the server answers. At
the end all accepted jobs must have been made, each once. The result is a table of docs/deploy.md.

    python -m benchmarks queue_load --times 10 > benchmarks/results/2026-11-28_cpu_queue_load.json
"""

from __future__ import annotations

import io
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.options import make_parser

LEAST_CLIENTS = 16
START_S, END_S = 60.0, 600.0


@dataclass(frozen=True)
class WaitingEngines:
    """Makes engines that wait `seconds` for each video and then copy `video`; they note what they made."""

    video: Path
    seconds: float
    notes: Path

    def __call__(self, seat: Any) -> WaitingEngine:
        return WaitingEngine(self)


class WaitingEngine:
    def __init__(self, settings: WaitingEngines) -> None:
        self._settings = settings

    def run(
        self, model: str, request: Any, output: Path, on_event: Callable[[Any], None], should_stop: Any
    ) -> Any:
        from omniavatar.engine.events import RequestStarted, WindowFinished
        from omniavatar.serve.batch.items import Made

        on_event(RequestStarted(0, output.name, 10, 1, 1, 0))
        time.sleep(self._settings.seconds)
        on_event(WindowFinished(0, 1, 10, self._settings.seconds))
        shutil.copy(self._settings.video, output)
        values = {"bytes": output.stat().st_size, "windows": 1, "frames": 10, "resumed_windows": 0}
        output.with_suffix(".json").write_text(json.dumps({**values, "plan": {"duration_s": 0.4}}))
        with self._settings.notes.open("a") as file:
            file.write(f"{output.parents[1].name}\n")
        return Made(10, 1, 0, 0.4)

    def device(self) -> str:
        return "none"

    def intact(self) -> bool:
        return True


def main(arguments: Sequence[str]) -> int:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--job-seconds", type=float, default=1.0, help="of the engine (default: 1)")
    parser.add_argument("--queue-length", type=int, default=100, help="most unfinished jobs (default: 100)")
    parser.add_argument("--times", type=float, default=10.0, help="load, in capacities (default: 10)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the load (default: 40)")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "PORT"), help="used by the benchmark itself")
    options = parser.parse_args(arguments)
    if options.serve:
        _serve(Path(options.serve[0]), int(options.serve[1]), options)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="omniavatar-queue-"))
    port = _free_port()
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "queue_load",
        *arguments,
        "--serve",
        str(folder),
        str(port),
    ]
    server = subprocess.Popen(command)
    try:
        print(json.dumps(_measure(folder, f"http://127.0.0.1:{port}", options, server)))
    finally:
        server.terminate()
        server.wait(60)
        shutil.rmtree(folder)
    return 0


def _serve(folder: Path, port: int, options: Any) -> None:
    """The server and its workers."""
    import uvicorn

    from omniavatar.serve.api.app import create_app
    from omniavatar.serve.api.models import Catalogue
    from omniavatar.serve.jobs.files import JobFiles
    from omniavatar.serve.jobs.keys import KeyStore
    from omniavatar.serve.jobs.process_crew import ProcessCrew
    from omniavatar.serve.jobs.store import JobStore
    from omniavatar.serve.jobs.workers import Workers
    from omniavatar.serve.settings import ServeSettings

    settings = ServeSettings(
        data_dir=folder, queue_length=options.queue_length, requests_per_minute=10**9, check_processes=1
    )
    store, files = JobStore.open(settings.database_url), JobFiles(settings.files_place)
    engines: Any = WaitingEngines(_video(folder), options.job_seconds, folder / "made")
    crew = ProcessCrew(options.workers, engines, files)
    workers = Workers(store, files, lambda: crew, ["pocket"])
    ready = lambda: workers.status().ready == options.workers  # noqa: E731
    models = Catalogue.load(settings)
    app = create_app(settings, store, files, KeyStore(store.database), models, ready=ready)
    workers.start()
    uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False, backlog=2048)
    workers.stop()
    workers.join(30.0)


def _measure(folder: Path, address: str, options: Any, server: Any) -> dict[str, Any]:
    import httpx

    from omniavatar.serve.jobs.records import JobStatus
    from omniavatar.serve.jobs.store import JobStore

    store = JobStore.open(f"sqlite:///{folder / 'jobs.db'}")
    portrait, answers = _portrait(), []
    lock = threading.Lock()
    client = httpx.Client(base_url=address, timeout=60.0)

    def submit() -> tuple[int, str, float]:
        began = time.monotonic()
        reply = client.post(
            "/v1/videos", data={"prompt": "a person talks"}, files={"input_reference": ("a.png", portrait)}
        )
        body = reply.json()
        text = body["id"] if reply.status_code == 200 else body["error"]["code"]
        answer = (reply.status_code, text, time.monotonic() - began)
        with lock:
            answers.append(answer)
        return answer

    _wait(lambda: server.poll() is None and _is_ready(client), START_S, "the server does not become ready")
    first = [submit()[1] for _ in range(10 * options.workers)]
    _wait(lambda: not store.unfinished(), END_S, "the first jobs do not end")
    jobs = sorted(store.get(id).completed_at or 0.0 for id in first)
    capacity = (len(jobs) - 1) / (jobs[-1] - jobs[0])

    answers.clear()
    offered = options.times * capacity
    count = round(offered * options.seconds)
    began, full_at = time.monotonic(), [0.0]
    with ThreadPoolExecutor(max(LEAST_CLIENTS, round(4 * offered))) as pool:
        for number in range(count):
            time.sleep(max(0.0, began + number / offered - time.monotonic()))
            if not full_at[0] and any(status == 503 for status, _, _ in answers):
                full_at[0] = time.monotonic() - began
            pool.submit(submit)
    took = time.monotonic() - began
    accepted = [text for status, text, _ in answers if status == 200]
    refused = [text for status, text, _ in answers if status == 503 and text == "queue_full"]
    _wait(lambda: not store.unfinished(), END_S, "the accepted jobs do not end")
    records = [store.get(id) for id in accepted]
    made = Counter((folder / "made").read_text().split())
    started = min(record.created_at for record in records)
    late = [
        (record.started_at or 0.0) - record.created_at
        for record in records
        if record.created_at - started > full_at[0] > 0
    ]
    ends = sorted(record.completed_at or 0.0 for record in records)
    seconds = sorted(answer[2] for answer in answers)
    return {
        "benchmark": "queue_load",
        "workers": options.workers,
        "job_seconds": options.job_seconds,
        "queue_length": options.queue_length,
        "capacity_per_s": round(capacity, 3),
        "offered_per_s": round(count / took, 3),
        "seconds": round(took, 1),
        "offered": count,
        "accepted": len(accepted),
        "refused": len(refused),
        "others": count - len(accepted) - len(refused),
        "lost": sum(record.status is not JobStatus.completed for record in records),
        "twice": sum(made[id] > 1 for id in accepted),
        "full_after_s": round(full_at[0], 2),
        "full_wait_s": round(statistics.median(late), 2) if late else 0.0,
        "made_per_s": round((len(ends) - 1) / (ends[-1] - ends[0]), 3),
        "answer_s": {
            "median": round(statistics.median(seconds), 4),
            "p99": round(seconds[int(0.99 * len(seconds))], 4),
        },
        "device": f"{platform.machine()}, {_cores()} cores",
        "python": platform.python_version(),
    }


def _is_ready(client: Any) -> bool:
    import httpx

    try:
        return bool(client.get("/ready").status_code == 200)
    except httpx.TransportError:
        return False


def _wait(done: Callable[[], bool], seconds: float, problem: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(problem)
        time.sleep(0.2)


def _portrait() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (256, 256), (90, 120, 150)).save(file, "PNG")
    return file.getvalue()


def _video(folder: Path) -> Path:
    from fractions import Fraction

    import numpy as np

    from omniavatar.media.video import encode_segment

    path = folder / "video.mp4"
    encode_segment([np.zeros((10, 64, 64, 3), np.uint8)], path, Fraction(25), (64, 64), preset="ultrafast")
    return path


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))
