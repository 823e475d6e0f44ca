"""The end of `omniavatar serve`; `tests/stress/real_programs.py` does the same with running jobs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from processes import start
from stress.programs import SERVER, free_port, wait_until_up

pytestmark = pytest.mark.slow


def test_sigterm_ends_a_server_with_its_workers_and_without_an_error(tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    options = ["--data-dir", str(tmp_path), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = start([sys.executable, "-c", SERVER, "serve", *options], env=environment, stderr=log)
    try:
        wait_until_up(f"http://127.0.0.1:{port}")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
