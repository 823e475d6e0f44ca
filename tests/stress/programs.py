"""The processes of the stress: the real server, and others that can be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from media_files import segments

SERVER = "from omniavatar.cli import command; command()"
WORKER_MODULE = "omniavatar.serve.jobs.process"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Child:
    """A process of this Python that can be killed and started again. Its stderr is appended to `log`.

    cpu_s: processor time of the killed ones and their children.
    """

    def __init__(self, log: Path, *arguments: str, **environment: str) -> None:
        self._log, self._arguments, self._environment = log, arguments, environment
        self.cpu_s = 0.0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **self._environment}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        with self._log.open("ab") as log:
            return subprocess.Popen([sys.executable, *self._arguments], env=environment, stderr=log)

    def kill(self) -> None:
        self.count_cpu()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_and_start(self) -> None:
        self.kill()
        self.process = self._start()

    def count_cpu(self) -> None:
        """Add what the running process and its children have used."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            self.cpu_s += sum(process.cpu_times()[:4])
            for child in process.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    self.cpu_s += sum(child.cpu_times()[:4])

    def workers(self) -> list[psutil.Process]:
        """Its processes that make videos."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if WORKER_MODULE in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def served(folder: Path, **settings: object) -> Iterator[tuple[str, Child]]:
    """The address of `omniavatar serve --api-only` whose data lie in `folder`, and its process."""
    port = free_port()
    values = {"requests_per_minute": 10**9, **settings}
    environment = {f"OMNIAVATAR_SERVE_{name.upper()}": str(value) for name, value in values.items()}
    arguments = ["serve", "--api-only", "--data-dir", str(folder), "--port", str(port)]
    child = Child(folder / "server.log", "-c", SERVER, *arguments, **environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(address)
        yield address, child
    finally:
        child.kill()


@dataclass(frozen=True)
class Served:
    """A server with workers around an engine that only waits. made: the video of every job."""

    address: str
    server: Child
    workers: Child
    made: Path


@contextmanager
def working(folder: Path, workers: int = 2, **settings: object) -> Iterator[Served]:
    """A server and its workers, ready; see `served`."""
    (folder / "notes").mkdir()
    made = segments(folder, [9])[0].rename(folder / "made.mp4")
    with served(folder, **settings) as (address, server):
        database = str(settings.get("database", ""))
        child = Child(folder / "workers.log", "-m", "stress.workers", str(folder), str(workers), database)
        try:
            while httpx.get(f"{address}/ready").status_code != 200:
                time.sleep(0.1)
            yield Served(address, server, child, made)
        finally:
            child.kill()


def wait_until_up(address: str) -> None:
    ends = time.monotonic() + 60
    with httpx.Client() as client:
        while time.monotonic() < ends:
            try:
                client.get(f"{address}/health")
                return
            except httpx.TransportError:
                time.sleep(0.1)
    raise SystemExit("error: the server did not start within 60 s")


def lines(log: Path, text: str) -> int:
    """How many lines of a log contain `text`."""
    return sum(text in line for line in log.read_text(errors="replace").splitlines()) if log.exists() else 0


def statuses(log: Path) -> dict[str, int]:
    """How many replies of each status a server's log has."""
    found: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        if '"message": "request"' in line:
            found[str(json.loads(line)["status"])] += 1
    return dict(sorted(found.items()))
