"""The model runs ahead of the writer, the writer of nobody: who waits for what, clocks and events faked."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from engine import make_pipeline, request
from omniavatar.device import arrival, download, upload
from omniavatar.engine import window_loop as generation
from omniavatar.engine import writer as output
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.window_loop import WindowGenerator, WindowResult
from omniavatar.errors import OutputError
from queue_clock import QueueClock

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint, tmp_path_factory):
    return make_pipeline(nano_checkpoint, tmp_path_factory.mktemp("text-cache"))


def test_queued_stages_are_timed_by_the_device_and_asked_for_late() -> None:
    recorder, clock = RunRecorder(), QueueClock()
    recorder.use_clock(clock)
    with recorder.stage("outer"):
        clock.now += 1.0
        with recorder.stage("inner"):
            clock.now += 2.0
    assert clock.asked == 0
    times = recorder.timings()
    assert (times["outer"].seconds, times["outer"].own_seconds, times["inner"].seconds) == (3.0, 1.0, 2.0)
    assert list(times) == ["inner", "outer"]
    assert recorder.timings()["outer"].seconds == 3.0


def test_other_threads_keep_the_hosts_clock_and_do_not_settle_the_devices() -> None:
    recorder, clock = RunRecorder(), QueueClock()
    recorder.use_clock(clock)
    with recorder.stage("device"):
        clock.now += 100.0

    def write() -> None:
        with recorder.stage("write"):
            time.sleep(0.01)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert clock.asked == 0
    assert 0.01 <= recorder.timings()["write"].seconds < 50.0


def test_copies_on_the_host_are_the_values() -> None:
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(download(upload(values, CPU)), values)
    arrival(CPU)()


def test_windows_are_queued_without_waiting_and_reading_waits(pipeline, monkeypatch) -> None:
    waits: list[int] = []

    def counted(device: torch.device) -> Any:
        return lambda: waits.append(1)

    monkeypatch.setattr(generation, "arrival", counted)
    kept: list[WindowResult] = []
    run = WindowGenerator.run

    def kept_run(self, *arguments):
        for result in run(self, *arguments):
            kept.append(result)
            assert not waits
            yield result
            waits.clear()

    monkeypatch.setattr(WindowGenerator, "run", kept_run)
    chunks = list(pipeline.stream(request(0.9)))
    assert len(kept) == len(chunks) > 1
    waits.clear()
    assert np.array_equal(np.concatenate(kept[0].frames), chunks[0].frames) and len(waits) == 1
    assert kept[0].next_given is not None and len(waits) == 2


def test_the_model_is_three_windows_ahead_of_the_writer_at_most(pipeline, monkeypatch, tmp_path) -> None:
    ahead: list[int] = []
    written = 0
    all_handed_over = threading.Event()
    encode, counting = output.encode_segment, threading.Lock()

    def slow(*arguments, **keywords):
        nonlocal written
        assert all_handed_over.wait(60)
        count = encode(*arguments, **keywords)
        with counting:
            written += 1
        return count

    submit = output.VideoWriter.submit

    def counted(self, result, begun):
        submit(self, result, begun)
        ahead.append(result.window.index + 1 - written)
        if len(ahead) == output.MOST_PENDING:
            all_handed_over.set()

    monkeypatch.setattr(output, "encode_segment", slow)
    monkeypatch.setattr(output.VideoWriter, "submit", counted)
    result = pipeline.generate(request(1.5), tmp_path / "out.mp4")
    assert len(ahead) == written == result.windows >= 4
    assert max(ahead) == output.MOST_PENDING


def test_nothing_is_written_after_a_window_that_failed(pipeline, monkeypatch, tmp_path) -> None:
    """Else the job would count a window whose segment is missing as done."""
    encode, calls = output.encode_segment, []
    computed = threading.Event()

    def failing(*arguments, **keywords):
        calls.append(arguments[1].name)
        if calls[-1] == "segment_00001.mp4":
            computed.wait(60)
            raise OutputError("disk full")
        return encode(*arguments, **keywords)

    submit = output.VideoWriter.submit

    def third_releases(self, result, begun):
        if result.window.index == 3:
            computed.set()
        submit(self, result, begun)

    monkeypatch.setattr(output, "encode_segment", failing)
    monkeypatch.setattr(output.VideoWriter, "submit", third_releases)
    target = tmp_path / "out.mp4"
    with pytest.raises(OutputError, match="disk full"):
        pipeline.generate(request(2.0), target)
    assert len(calls) < 5  # the fifth window was never encoded; the third may have been, beside the second
    assert json.loads((tmp_path / "out.mp4.job" / "job.json").read_text())["done"] == 1


def test_window_seconds_are_between_arrivals(nano_checkpoint, tmp_path, monkeypatch) -> None:
    """Not between the moments the host had queued them."""
    seconds: list[float] = []

    def listener(name, fields):
        if name == "window_finished":
            seconds.append(fields["seconds"])

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", RunRecorder([listener]))
    monkeypatch.setattr(generation, "arrival", lambda device: lambda: time.sleep(0.05))
    begun = time.perf_counter()
    pipe.generate(request(0.9), tmp_path / "out.mp4")
    assert len(seconds) >= 2 and all(each >= 0.05 for each in seconds)
    assert sum(seconds) <= time.perf_counter() - begun
