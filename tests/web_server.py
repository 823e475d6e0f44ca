"""`omniavatar web` in a process that tests may kill, with the packaged model made small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

import small_pocket
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.measure.projection import StartCosts, WindowCosts
from omniavatar.measure.times import PartTimes, times_name
from omniavatar.serve.jobs.process_crew import PROCESS as WORKER

SIZES = "[[64, 64], [64, 112], [112, 64]]"
TIMES = PartTimes(WindowCosts(0.1, 0.01, 0.4, 0.1, 0.01), StartCosts(0.01, 0.01), 164, 64 * 64 * 41)
"""What the page believes of this machine, so that no test waits for a measurement."""
START_S = 180.0


def small_config(folder: Path) -> Path:
    """The packaged model with small videos of three shapes."""
    path = small_pocket.write_config(folder / "small.yaml")
    text = path.read_text().replace("[[64, 64]]", SIZES).replace("num_steps: 1", "num_steps: 4")
    path.write_text(text)
    return path


class WebServer:
    """folder: with the data of all starts of this server. options: of the command."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.address, self._port = folder, "", "0"
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir()
        self._options = options

    def believe(self, *configs: Path, times: PartTimes = TIMES) -> None:
        """Let it take `times` for what it measured of these models."""
        for path in configs:
            config = changed(load_config(path).config, runtime={"threads": 1, "device": "cpu"})
            (self.folder / "data" / times_name(config)).write_text(times.text())

    def start(self) -> None:
        """Start it, on the same port as before, and wait until the page answers."""
        log = self.folder / "log"
        command = [sys.executable, "-m", "omniavatar.cli", "web", *self._options, "--no-browser"]
        command += ["--port", self._port, "--data-dir", str(self.folder / "data")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        ends = time.monotonic() + START_S
        while not (found := re.search(r"page is at (http://127\.0\.0\.1:(\d+)/)", log.read_text())):
            assert self._process.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        self.address, self._port = found[1], found[2]

    @contextmanager
    def stopped_worker(self) -> Iterator[None]:
        """Let no video go on inside, however busy the machine is; its worker stops at the running step."""
        assert self._process is not None
        children = psutil.Process(self._process.pid).children()
        (worker,) = [child for child in children if WORKER in child.cmdline()]
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()

    def kill(self) -> None:
        """End it at once, as a crash or a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
