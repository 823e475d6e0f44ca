"""The model runs ahead of the device and of the writer, within limits; devices and clocks are fakes."""

from __future__ import annotations

import json
import threading
import time
import weakref

import numpy as np
import pytest
import torch

from engine import make_pipeline, request, voice
from omniavatar import AvatarPipeline
from omniavatar.config.load import load_config
from omniavatar.device import arrival, download, upload
from omniavatar.engine.events import Message, WindowFinished
from omniavatar.engine.host import Host
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.segments import encoders_at_once
from omniavatar.engine.window_loop import WindowResult
from omniavatar.errors import OutputError, StoppedError
from omniavatar.media.audio import encode_aac_track
from omniavatar.media.inspect import probe_video
from omniavatar.plan.run import RunPlan, plan_run
from queue_clock import QueueClock

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("encoders", [1, 3])
def test_the_model_is_a_few_windows_ahead_of_the_writer(nano_checkpoint, tmp_path, encoders: int) -> None:
    """As many windows as are encoded at once, at least two, and one that is computed."""
    most = max(2, encoders) + 1
    ahead: list[int] = []
    written = 0
    all_handed_over = threading.Event()
    counting = threading.Lock()

    class Slow(Host):
        @property
        def encoders(self) -> int:
            return encoders

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


def test_the_model_is_a_few_windows_ahead_of_the_device(nano_checkpoint, tmp_path) -> None:
    """As many as closed windows are encoded at once, and one more, though more have a place behind it."""
    ahead: list[int] = []
    computed = 0
    all_queued = threading.Event()

    class Late(Host):
        encoders = 3

        def arrival(self, device):
            return self.wait

        def wait(self) -> None:
            nonlocal computed
            assert all_queued.wait(60)
            computed += 1

    class Counted(AvatarPipeline):
        def windows(self, *arguments):
            for result in super().windows(*arguments):
                yield result  # continues when the writer has queued it
                ahead.append(result.window.index + 1 - computed)
                if len(ahead) == 4:
                    all_queued.set()

    pipe = make_pipeline(
        nano_checkpoint, tmp_path / "cache", host=Late(), kind=Counted, num_steps=1, key_frame_s=1
    )
    assert pipe.generate(request(2.9), tmp_path / "out.mp4").windows == len(ahead) > 8
    assert max(ahead) == 4


def test_a_window_that_waits_for_its_encoder_holds_no_device_memory(nano_checkpoint, tmp_path) -> None:
    latents: list[weakref.ref[torch.Tensor]] = []
    freed = threading.Event()

    class Slow(Host):
        encoders = 8

        def encode_segment(self, *arguments, **keywords):
            assert freed.wait(60), "the latents of a window are held until it is encoded"
            return super().encode_segment(*arguments, **keywords)

    class Watched(AvatarPipeline):
        def windows(self, *arguments):
            for result in super().windows(*arguments):
                latents.append(weakref.ref(result.latent))
                yield result
                if len(latents) == 4:
                    while latents[0]() is not None or latents[1]() is not None:
                        time.sleep(0.01)
                    freed.set()

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", host=Slow(), kind=Watched, num_steps=1)
    assert pipe.generate(request(1.5), tmp_path / "out.mp4").windows >= 4


def test_the_model_does_not_wait_for_the_sound(nano_checkpoint, tmp_path) -> None:
    """Windows are encoded while the sound is; they are appended in order when it is done."""
    all_handed_over = threading.Event()

    class SlowSound(RunRecorder):
        def stage(self, name: str):
            if name == "audio_encode":
                assert all_handed_over.wait(60), "the model waited for the sound"
            return super().stage(name)

    class Two(Host):
        encoders = 2

    class Signalling(AvatarPipeline):
        def windows(self, *arguments):
            yield from super().windows(*arguments)
            all_handed_over.set()

    pipe = make_pipeline(
        nano_checkpoint, tmp_path / "cache", SlowSound(), host=Two(), kind=Signalling, num_steps=1
    )
    result = pipe.generate(request(1.5), tmp_path / "out.mp4")
    assert result.windows > 4
    info = probe_video(result.output)
    assert info.frames == result.frames and info.audio is not None


@pytest.mark.parametrize("slow", [False, True])
def test_an_encoder_that_holds_back_the_model_is_said(nano_checkpoint, tmp_path, slow: bool) -> None:
    class Busy(Host):
        encoders = 1

        def encode_segment(self, *arguments, **keywords):
            time.sleep(0.2 if slow else 0)
            return super().encode_segment(*arguments, **keywords)

    class Fast(AvatarPipeline):
        def windows(self, *arguments):
            made = super().windows(*arguments)
            return iter(list(made)) if slow else made

    heard: list[str] = []
    recorder = RunRecorder([lambda event: heard.append(event.text) if isinstance(event, Message) else None])
    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", recorder, host=Busy(), kind=Fast)
    assert pipe.generate(request(2.9), tmp_path / "out.mp4").windows >= 8
    said = [text for text in heard if text.startswith("the video encoder was busy")]
    assert len(said) == slow
    assert all("holds back the model; set preset to veryfast" in text for text in said)


def test_large_windows_are_encoded_two_at_a_time() -> None:
    """Their frames wait in memory."""

    class Many(Host):
        encoders = 8

    def plan(side: int) -> RunPlan:
        values = ["weights=random", "scale=nano", f"image_sizes_720=[[{side},{side}]]", "max_tokens=500000"]
        return plan_run(load_config(None, values).config, (side, side), 60 * 16000)

    assert encoders_at_once(Many(), plan(128)) == 8
    assert encoders_at_once(Many(), plan(2048)) == 2


def test_a_sound_that_cannot_be_encoded_ends_the_run(nano_checkpoint, tmp_path) -> None:
    """It is encoded beside the first windows; the next run goes on."""

    class FullDisk(RunRecorder):
        def stage(self, name: str):
            if name == "audio_encode":
                raise OutputError("sound: disk full")
            return super().stage(name)

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", FullDisk())
    with pytest.raises(OutputError, match="sound: disk full"):
        pipe.generate(request(1.5), tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    whole = make_pipeline(nano_checkpoint, tmp_path / "cache")
    assert probe_video(whole.generate(request(1.5), tmp_path / "out.mp4").output).audio is not None


def test_an_ended_run_does_not_encode_the_rest_of_its_sound(tmp_path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        encode_aac_track(voice(60.0), tmp_path / "sound.mp4", 0, 60, lambda: next(asked))
    assert list(tmp_path.iterdir()) == []


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

    device_works = threading.Lock()

    def compute() -> None:
        with device_works:
            time.sleep(0.05)

    class Late(Host):
        def arrival(self, device):
            return compute

    pipe = make_pipeline(nano_checkpoint, tmp_path / "cache", RunRecorder([listener]), host=Late())
    start = time.perf_counter()
    pipe.generate(request(0.9), tmp_path / "out.mp4")
    assert len(seconds) >= 2 and all(each >= 0.05 for each in seconds)
    assert sum(seconds) <= time.perf_counter() - start
