"""The model runs ahead of the device and of the writer, within limits; devices and clocks are fakes."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import make_pipeline, request
from omniavatar import AvatarPipeline
from omniavatar.config.load import load_config
from omniavatar.device import arrival, download, upload
from omniavatar.engine.events import WindowFinished
from omniavatar.engine.host import Host
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.window_loop import WindowResult
from omniavatar.engine.writer import encoders
from omniavatar.errors import OutputError
from omniavatar.plan.run import plan_run
from queue_clock import QueueClock

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_queued_stages_are_timed_by_the_device_and_read_late() -> None:
    recorder, clock = RunRecorder(), QueueClock()
    recorder.use_clock(clock)
    with recorder.stage("outer"):
        clock.now += 1.0
        with recorder.stage("inner"):
            clock.now += 2.0
    assert clock.reads == 0
    times = recorder.timings()
    assert (times["outer"].seconds, times["outer"].own_seconds, times["inner"].seconds) == (3.0, 1.0, 2.0)
    assert list(times) == ["inner", "outer"]
    assert recorder.timings()["outer"].seconds == 3.0


def test_other_threads_use_the_hosts_clock_and_do_not_read_the_devices() -> None:
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
    assert clock.reads == 0
    assert 0.01 <= recorder.timings()["write"].seconds < 50.0


def test_copies_on_the_host_have_the_same_values() -> None:
    values = torch.arange(6.0).view(2, 3)
    assert torch.equal(download(upload(values, CPU)), values)
    arrival(CPU)()


class Counting(Host):
    """A host that counts the waits for its device."""

    def __init__(self) -> None:
        self.waits: list[int] = []

    def arrival(self, device):
        return lambda: self.waits.append(1)


def test_queueing_windows_does_not_wait_and_reading_them_does(nano_checkpoint, tmp_path) -> None:
    host = Counting()
    kept: list[WindowResult] = []

    class Keeping(AvatarPipeline):
        def windows(self, *arguments):
            for result in super().windows(*arguments):
                kept.append(result)
                assert not host.waits
                yield result
                host.waits.clear()

    pipe = make_pipeline(nano_checkpoint, tmp_path, host=host, kind=Keeping)
    chunks = list(pipe.stream(request(0.9)))
    assert len(kept) == len(chunks) > 1
    host.waits.clear()
    assert np.array_equal(np.concatenate(kept[0].frames), chunks[0].frames) and len(host.waits) == 1
    assert kept[0].next_given is not None and len(host.waits) == 2


@pytest.mark.parametrize(("cores", "most"), [(2, 3), (9, 4)])
def test_the_model_is_few_windows_ahead_of_the_writer(nano_checkpoint, tmp_path, cores, most) -> None:
    ahead: list[int] = []
    written = 0
    all_handed_over = threading.Event()
    counting = threading.Lock()

    class Slow(Host):
        def cores(self):
            return cores

        def encode_segment(self, *arguments, **keywords):
            nonlocal written
            assert all_handed_over.wait(60)
            count = super().encode_segment(*arguments, **keywords)
            with counting:
                written += 1
            return count

    class Counted(AvatarPipeline):
        def windows(self, *arguments):
            for result in super().windows(*arguments):
                yield result  # continues when the writer has queued it
                ahead.append(result.window.index + 1 - written)
                if len(ahead) == most:
                    all_handed_over.set()

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Slow(), kind=Counted)
    result = pipe.generate(request(1.5), tmp_path / "out.mp4")
    assert len(ahead) == written == result.windows >= 4
    assert max(ahead) == most


def test_short_windows_are_encoded_side_by_side() -> None:
    """Chunks of FlashHead and LeapTalk are; long windows are not, whose frames would fill the memory."""
    chunk = load_config(CONFIGS / "leaptalk.yaml").config
    window = load_config(CONFIGS / "inference_1.3B.yaml").config
    plans = [plan_run(config, config.video.sizes[0], 160_000) for config in (chunk, window)]
    assert [encoders(plans[0], cores) for cores in (1, 9, 16, 64)] == [2, 3, 5, 6]
    assert [encoders(plans[1], cores) for cores in (1, 64)] == [2, 2]


def test_nothing_is_written_after_a_window_that_failed(nano_checkpoint, tmp_path) -> None:
    """Otherwise the job would count a window as done although its segment is missing."""
    calls: list[str] = []
    computed = threading.Event()

    class Failing(Host):
        def encode_segment(self, frames, path, **options):
            calls.append(path.name)
            if calls[-1] == "segment_00001.mp4":
                computed.wait(60)
                raise OutputError("disk full")
            return super().encode_segment(frames, path, **options)

    class Releasing(AvatarPipeline):
        def windows(self, *arguments):
            for result in super().windows(*arguments):
                if result.window.index == 3:
                    computed.set()
                yield result

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Failing(), kind=Releasing)
    with pytest.raises(OutputError, match="disk full"):
        pipe.generate(request(2.0), tmp_path / "out.mp4")
    assert len(calls) < 5  # never the fifth window; perhaps the third, beside the second
    assert json.loads((tmp_path / "out.mp4.job" / "job.json").read_text())["done"] == 1


def test_window_seconds_are_between_arrivals(nano_checkpoint, tmp_path) -> None:
    """Not between the times at which the host queued them."""
    seconds: list[float] = []

    def listener(event):
        if isinstance(event, WindowFinished):
            seconds.append(event.seconds)

    class Late(Host):
        def arrival(self, device):
            return lambda: time.sleep(0.05)

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", RunRecorder([listener]), host=Late())
    start = time.perf_counter()
    pipe.generate(request(0.9), tmp_path / "out.mp4")
    assert len(seconds) >= 2 and all(each >= 0.05 for each in seconds)
    assert sum(seconds) <= time.perf_counter() - start
