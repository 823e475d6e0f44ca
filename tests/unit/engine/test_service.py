"""What a service uses: warm-up, close, stopping, inputs from memory, events, the logger."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import threading
import wave
import weakref

import numpy as np
import PIL.Image
import pytest
import torch

from engine import SIDE, make_pipeline, portrait, request, voice
from omniavatar import AvatarPipeline, AvatarRequest, Event, StoppedError, log_event
from omniavatar.config.load import load_config
from omniavatar.engine.events import (
    Message,
    RequestFinished,
    RequestStarted,
    StepFinished,
    WindowFinished,
    WindowStarted,
)
from omniavatar.engine.orders import EndOrder
from omniavatar.engine.recorder import MOST_QUEUED, RunRecorder
from omniavatar.errors import ConfigError, InputError, ResumeError
from omniavatar.parallel.ranks import Ranks

RANDOM = dict(
    weights="random", scale="nano", dtype="fp32", device="cpu", num_steps=2, guidance_scale=1.0,
    image_sizes_720=[[SIDE, SIDE]], max_tokens=56, overlap_frame=5, seq_len=9, preset="ultrafast",
)  # fmt: skip


class StopAfter:
    """Says to stop after it was asked `count` times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


ASKED_BEFORE = 4
"""Before the run begins, and before each of three encoders; then once a step."""


@pytest.mark.parametrize(
    ("asked", "where", "done"),
    [
        (0, "before it began", None),
        (2, "before the sound was encoded", None),
        (ASKED_BEFORE + 1, "before step 2 of 2 of window 1 of 3", None),
        (ASKED_BEFORE + 3, "before step 2 of 2 of window 2 of 3", 1),
    ],
)
def test_a_stopped_run_keeps_finished_windows_and_can_go_on(
    pipeline, whole, asked, where, done, tmp_path
) -> None:
    output = tmp_path / "x.mp4"
    with pytest.raises(StoppedError, match=where) as error:
        pipeline.generate(request(0.7), output, should_stop=StopAfter(asked))
    assert error.value.exit_code == 130
    job = tmp_path / "x.mp4.job" / "job.json"
    assert (json.loads(job.read_text())["done"] if job.exists() else None) == done
    assert not output.exists()
    result = pipeline.generate(request(0.7), output, should_stop=threading.Event().is_set)
    assert result.resumed_windows == (done or 0) and output.read_bytes() == whole


def test_a_stream_can_be_stopped_by_another_thread(pipeline) -> None:
    stop = threading.Event()
    with pytest.raises(StoppedError, match="window 2 of 3"):
        for chunk in pipeline.stream(request(0.7), should_stop=stop.is_set):
            assert chunk.window == 0
            threading.Thread(target=stop.set).start()
            assert stop.wait(30)


def stopped_together(team: Ranks, output: str, stop_after: int) -> list[str]:
    """What happens to a stopped request and to the one after it, on the leader."""
    config = load_config(None, {**RANDOM, "sp_size": team.size}).config
    pipe = AvatarPipeline(config, RunRecorder(), team)
    if not team.leads:
        pipe.follow()
        return []
    found = []
    try:
        pipe.generate(request(0.7), output, should_stop=StopAfter(stop_after))
    except StoppedError as error:
        found.append(str(error))
    found.append(str(pipe.generate(request(0.7), output).resumed_windows))
    team.order(EndOrder())
    return found


def test_all_ranks_stop_at_the_same_step_and_take_the_next_request(pools, tmp_path) -> None:
    where, resumed = pools[2].run(stopped_together, str(tmp_path / "x.mp4"), ASKED_BEFORE + 3)[0]
    assert "before step 2 of 2 of window 2 of 3" in where and resumed == "1"


def test_a_closed_pipeline_frees_its_models_and_says_so(nano_checkpoint, cache) -> None:
    with make_pipeline(nano_checkpoint, cache) as pipe:
        assert len(list(pipe.stream(request(0.1))))
        models = pipe.models
        assert {"dit", "vae", "prompts", "audio_encoder"} <= set(vars(models))
    assert not {"dit", "vae", "window_vae", "prompts", "audio_encoder"} & set(vars(models))
    with pytest.raises(RuntimeError, match="closed; make another"):
        list(pipe.stream(request(0.1)))
    pipe.close()


def test_a_warm_pipeline_loads_nothing_more_and_makes_the_same_frames(nano_checkpoint, cache) -> None:
    events: list[Event] = []
    recorder = RunRecorder([events.append])
    pipe = make_pipeline(nano_checkpoint, cache, recorder)
    pipe.warm_up()
    steps = [event for event in events if isinstance(event, StepFinished)]
    assert [(step.window, step.steps, step.passes) for step in steps] == [(0, 1, 2), (1, 1, 2)]
    loads = {name: recorder.timings()[name].count for name in ("load_dit", "load_vae", "load_audio_encoder")}
    warm = np.concatenate([chunk.frames for chunk in pipe.stream(request(0.3))])
    assert loads == {name: recorder.timings()[name].count for name in loads}
    cold = make_pipeline(nano_checkpoint, cache)
    assert np.array_equal(warm, np.concatenate([chunk.frames for chunk in cold.stream(request(0.3))]))
    with pytest.raises(ConfigError, match=r"size: 8x8.*64x64"):
        pipe.warm_up((8, 8))


def picture_bytes() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(portrait()).save(buffer, "PNG")
    return buffer.getvalue()


def sound_bytes(seconds: float) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((voice(seconds).samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def test_bytes_and_file_objects_make_the_video_of_the_files(pipeline, tmp_path, monkeypatch) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    picture, sound = picture_bytes(), sound_bytes(0.3)
    (tmp_path / "face.png").write_bytes(picture)
    (tmp_path / "voice.wav").write_bytes(sound)
    output = tmp_path / "x.mp4"
    forms = [
        (tmp_path / "face.png", str(tmp_path / "voice.wav")),
        (picture, bytearray(sound)),
        (io.BytesIO(picture), io.BytesIO(sound)),
    ]
    made = []
    for image, audio in forms:
        pipeline.generate(request(image=image, audio=audio), output, resume=False)
        made.append(output.read_bytes())
    assert made[0] == made[1] == made[2]
    with (tmp_path / "face.png").open("rb") as image, (tmp_path / "voice.wav").open("rb") as audio:
        again = pipeline.generate(request(image=image, audio=audio), output)  # known by their content
    assert again.resumed_windows == again.windows and not list(private.glob("omniavatar-*"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": b"not a picture"}, "image"),
        ({"audio": b"not a sound"}, "audio"),
        ({"image": b""}, "image.*empty"),
        ({"audio": io.StringIO("text")}, "audio: the file object gives no bytes; open it in binary mode"),
        ({"audio": np.zeros(100, np.float32)}, "audio: is of type ndarray; give one of.*bytes.*Waveform"),
        ({"image": 5}, "image: is of type int"),
    ],
)
def test_inputs_of_a_wrong_kind_are_one_line(pipeline, change, text, tmp_path) -> None:
    with pytest.raises(InputError, match=text) as error:
        pipeline.generate(request(0.1, **change), tmp_path / "x.mp4")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_closed_file_object_is_one_line(pipeline, tmp_path) -> None:
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(InputError, match="audio: the file object cannot be read"):
        pipeline.generate(request(0.1, audio=closed), tmp_path / "x.mp4")


def test_on_event_gets_every_event_and_the_logger_the_messages(caplog) -> None:
    events: list[Event] = []
    config = load_config(None, RANDOM).config
    with caplog.at_level(logging.DEBUG, "omniavatar"):
        pipe = AvatarPipeline(config, on_event=events.append)
        list(pipe.stream(AvatarRequest("a person", portrait())))
    kinds = {type(event) for event in events}
    assert {Message, WindowStarted, StepFinished} <= kinds
    logged = [record.getMessage() for record in caplog.records if record.name == "omniavatar"]
    assert all(event.text in logged for event in events if isinstance(event, Message))
    assert sum(line.startswith("step {") for line in logged) == sum(
        isinstance(event, StepFinished) for event in events
    )
    with pytest.raises(ValueError, match="not both"):
        AvatarPipeline(config, RunRecorder(), on_event=events.append)


@pytest.mark.parametrize(
    ("event", "level"),
    [
        (Message("careful", "warning"), logging.WARNING),
        (Message("done"), logging.INFO),
        (RequestStarted(0, "x.mp4", 31, 4, 2, 0), logging.INFO),
        (RequestFinished("x.mp4", 1.0, 31), logging.INFO),
        (WindowFinished(0, 4, 13, 0.5), logging.INFO),
        (WindowStarted(0, 4), logging.DEBUG),
        (StepFinished(0, 0, 2, "compute", 1), logging.DEBUG),
    ],
)
def test_levels_of_the_logger(event: Event, level: int, caplog) -> None:
    with caplog.at_level(logging.DEBUG, "omniavatar"):
        log_event(event)
    assert [record.levelno for record in caplog.records] == [level]


@pytest.mark.parametrize("kind", [StepFinished, WindowFinished])
def test_a_listener_that_raises_ends_the_run_and_finished_windows_stay(
    nano_checkpoint, cache, whole, kind, tmp_path
) -> None:
    """Steps happen in the caller's thread, finished windows in the writer's."""

    class PlayerClosed(Exception):
        pass

    failing = True

    def listener(event: Event) -> None:
        if failing and isinstance(event, kind) and event.window == 1:
            raise PlayerClosed

    pipe = make_pipeline(nano_checkpoint, cache, RunRecorder([listener]))
    output = tmp_path / "x.mp4"
    with pytest.raises(PlayerClosed):
        pipe.generate(request(0.7), output)
    failing = False
    result = pipe.generate(request(0.7), output)
    assert result.resumed_windows == (1 if kind is StepFinished else 2) and output.read_bytes() == whole


def test_a_run_does_not_continue_with_another_number_of_cpu_threads(pipeline, whole, tmp_path) -> None:
    """Sums on a CPU are split among its threads, so the rest would be a slightly different video."""
    output, threads = tmp_path / "x.mp4", torch.get_num_threads()
    with pytest.raises(StoppedError):
        pipeline.generate(request(0.7), output, should_stop=StopAfter(ASKED_BEFORE + 2))
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(ResumeError, match=f"changed: runtime.threads: {threads} -> {threads + 1}"):
            pipeline.generate(request(0.7), output)
    finally:
        torch.set_num_threads(threads)
    result = pipeline.generate(request(0.7), output)
    assert result.resumed_windows == 1 and output.read_bytes() == whole
    assert json.loads(result.sidecar.read_text())["threads"] == threads


class Mark:
    """A moment of `QueuedClock`."""

    def __init__(self, number: int) -> None:
        self.number = number


class QueuedClock:
    """A clock whose marks are counted, as a device's that has reached all of them."""

    queued = True

    def __init__(self) -> None:
        self.now = 0
        self.alive: weakref.WeakSet[Mark] = weakref.WeakSet()

    def mark(self) -> Mark:
        self.now += 1
        made = Mark(self.now)
        self.alive.add(made)
        return made

    def seconds(self, start: Mark, end: Mark) -> float:
        return float(end.number - start.number)

    def moment(self, mark: Mark) -> float:
        return float(mark.number)


def test_stages_of_a_queued_clock_do_not_pile_up() -> None:
    """A program that only streams never reads the times, and each mark is an event of the device."""
    recorder, clock = RunRecorder(), QueuedClock()
    recorder.use_clock(clock)
    for _ in range(3 * MOST_QUEUED):
        with recorder.stage("denoise"):
            pass
    assert len(clock.alive) <= 2 * MOST_QUEUED + 2
    times = recorder.timings()["denoise"]
    assert (times.count, times.seconds) == (3 * MOST_QUEUED, 3 * MOST_QUEUED)
