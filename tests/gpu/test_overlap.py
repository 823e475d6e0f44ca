"""On CUDA nothing between two windows makes the host wait, and queueing ahead changes no byte."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
import torch

from engine import make_pipeline
from engine import request as speech
from omniavatar.device import arrival, download, upload
from omniavatar.engine.clocks import DeviceClock
from omniavatar.engine.window_loop import WindowGenerator

pytestmark = pytest.mark.gpu
SLEEP_CYCLES = 1_000_000_000


VARIANTS: list[dict[str, Any]] = [
    {},
    {"quantize": "fp8", "guidance_scale": 1.0},
    {"sampler": "renoise", "guidance_scale": 1.0, "num_steps": 4},
    {"step_cache": "magcache", "scale": "1.3B", "num_steps": 8, "magcache_thresh": 0.2},
]


@pytest.fixture(scope="module", params=VARIANTS, ids=["plain", "fp8", "renoise", "magcache"])
def pipeline(request, nano_checkpoint, tmp_path_factory):
    cache = tmp_path_factory.mktemp("text-cache")
    return make_pipeline(nano_checkpoint, cache, device="cuda", dtype="bf16", **request.param)


def test_the_windows_queue_without_a_synchronising_call(pipeline, monkeypatch):
    """The first window may wait (it compiles kernels and allocates memory); the others must not."""
    results = []
    run = WindowGenerator.run

    def checked(self, *arguments):
        try:
            for result in run(self, *arguments):
                results.append(result)
                torch.cuda.set_sync_debug_mode("default")
                yield result
                torch.cuda.set_sync_debug_mode("error")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    list(pipeline.stream(speech(1.5)))
    monkeypatch.setattr(WindowGenerator, "run", checked)
    list(pipeline.stream(speech(1.5)))
    assert len(results) >= 3


def test_running_ahead_changes_no_byte(pipeline, monkeypatch):
    waited = np.concatenate([chunk.frames for chunk in pipeline.stream(speech(1.5))])
    run = WindowGenerator.run
    monkeypatch.setattr(WindowGenerator, "run", lambda self, *rest: iter(list(run(self, *rest))))
    ahead = np.concatenate([chunk.frames for chunk in pipeline.stream(speech(1.5))])
    assert np.array_equal(waited, ahead)


def test_copies_do_not_wait_and_arrive():
    values = torch.randn(1000, 1000)
    device = torch.device("cuda")
    download(upload(values, device))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    torch.cuda._sleep(SLEEP_CYCLES)
    host = download(upload(values, device))
    wait = arrival(device)
    assert time.perf_counter() - begun < 0.2
    wait()
    assert time.perf_counter() - begun > 0.3
    assert torch.equal(host, values)


def test_a_stage_lasts_as_long_as_the_device_needs():
    clock = DeviceClock(torch.device("cuda"))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    start = clock.mark()
    torch.cuda._sleep(SLEEP_CYCLES)
    end = clock.mark()
    assert time.perf_counter() - begun < 0.2
    seconds = clock.seconds(start, end)
    assert seconds == pytest.approx(time.perf_counter() - begun, rel=0.1)
    assert clock.moment(start) == pytest.approx(begun, abs=0.01)
    assert clock.moment(end) == pytest.approx(begun + seconds, abs=0.01)


def test_the_sidecars_stages_are_those_of_the_device(pipeline, tmp_path):
    """Stages of one stream do not overlap, so their sum is no longer than the run."""
    result = pipeline.generate(speech(1.5), tmp_path / "out.mp4")
    stages = json.loads(result.sidecar.read_text())["stages"]
    queued = ("denoise", "vae_decode", "vae_encode")
    assert all(stages[name] > 0 for name in queued)
    assert sum(stages[name] for name in queued) <= result.seconds
