"""On CUDA nothing between two windows makes the host wait, and running ahead changes no byte."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from engine import make_pipeline, request
from omniavatar.generation import WindowGenerator
from omniavatar.ops.transfer import arrival, download, upload
from omniavatar.profiling.clocks import DeviceClock

pytestmark = pytest.mark.gpu
SLEEP_CYCLES = 1_000_000_000


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint, tmp_path_factory):
    cache = tmp_path_factory.mktemp("text-cache")
    return make_pipeline(nano_checkpoint, cache, device="cuda", dtype="bf16")


def test_the_windows_queue_without_a_synchronising_call(pipeline, monkeypatch):
    """The first window may wait (kernels are compiled, memory is taken); the others may not."""
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

    list(pipeline.stream(request(1.5)))
    monkeypatch.setattr(WindowGenerator, "run", checked)
    list(pipeline.stream(request(1.5)))
    assert len(results) >= 3


def test_running_ahead_changes_no_byte(pipeline, monkeypatch):
    waited = np.concatenate([chunk.frames for chunk in pipeline.stream(request(1.5))])
    run = WindowGenerator.run
    monkeypatch.setattr(WindowGenerator, "run", lambda self, *rest: iter(list(run(self, *rest))))
    ahead = np.concatenate([chunk.frames for chunk in pipeline.stream(request(1.5))])
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
