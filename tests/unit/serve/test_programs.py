"""The end of `omniavatar serve`; `tests/stress/real_programs.py` does the same with running jobs."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from omniavatar.media.inspect import probe_video
from processes import start
from readme_programs import REPOSITORY, TINY
from serve_api import FILES
from stress.programs import SERVER, free_port, wait_until_up

pytestmark = pytest.mark.slow


def finished(client: httpx.Client, id: str) -> dict[str, Any]:
    """The job when it is over."""
    end = time.monotonic() + 120
    while (job := client.get(f"/v1/videos/{id}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < end, job
        time.sleep(0.1)
    return dict(job)


def test_a_block_causal_model_is_served_and_sigterm_ends_it_without_an_error(tmp_path: Path) -> None:
    """configs/livetalk.yaml at nano size with random weights: one job over HTTP."""
    model = yaml.safe_load((REPOSITORY / "configs/livetalk.yaml").read_text())
    model = {name: value for name, value in model.items() if not name.endswith("_path")}
    (tmp_path / "livetalk.yaml").write_text(yaml.safe_dump({**model, **TINY}))
    (tmp_path / "serve.yaml").write_text(
        yaml.safe_dump({"models": {"livetalk": str(tmp_path / "livetalk.yaml")}})
    )
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    options = ["-c", str(tmp_path / "serve.yaml"), "--data-dir", str(tmp_path), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = start([sys.executable, "-c", SERVER, "serve", *options], env=environment, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_up(address)
        with httpx.Client(base_url=address) as client:
            asked = client.post(
                "/v1/videos", data={"model": "livetalk", "prompt": "A man talks"}, files=FILES
            )
            job = finished(client, asked.json()["id"])
            assert job["status"] == "completed" and job["windows"] > 1, job
            (tmp_path / "out.mp4").write_bytes(client.get(f"/v1/videos/{job['id']}/content").content)
        info = probe_video(tmp_path / "out.mp4")
        assert (info.width, info.height, float(info.fps)) == (64, 64, 16.0)
        assert info.duration_s == pytest.approx(float(job["seconds"]), abs=0.07)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
