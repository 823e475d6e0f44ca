"""Recorders sum nested stages and forward events; displays show the events."""

from __future__ import annotations

import io
import json
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from omniavatar.cli.progress import Bars, JsonLines, Quiet, make_display
from omniavatar.engine.events import (
    Message,
    RequestFinished,
    RequestStarted,
    StepFinished,
    WindowFinished,
    WindowStarted,
)
from omniavatar.engine.recorder import NullRecorder, RunRecorder, stage_seconds
from omniavatar.types import Event

RUN = [
    RequestStarted(index=0, name="[a].mp4", frames=33, windows=2, steps=2, resumed_windows=0),
    Message("[odd] note", "warning"),
    WindowStarted(window=0, windows=2),
    StepFinished(window=0, step=0, steps=2, action="compute", passes=2),
    StepFinished(window=0, step=1, steps=2, action="reuse", passes=2),
    WindowFinished(window=0, windows=2, frames_done=25, seconds=1.5),
    WindowStarted(window=1, windows=2),
    RequestFinished(output="out/[a].mp4", seconds=3.0, frames=33),
]


def test_nested_stages_are_summed() -> None:
    recorder = RunRecorder()
    for _ in range(2):
        with recorder.stage("outer"), recorder.stage("inner"):
            time.sleep(0.01)
    times = recorder.timings()
    assert times["outer"].count == times["inner"].count == 2
    assert times["outer"].seconds >= times["inner"].seconds >= 0.02
    without_inner = times["outer"].seconds - times["inner"].seconds
    assert times["outer"].own_seconds == pytest.approx(without_inner)
    assert times["inner"].own_seconds == times["inner"].seconds


def test_stage_that_raises_counts_and_later_nesting_is_right() -> None:
    recorder = RunRecorder()
    with pytest.raises(KeyError), recorder.stage("a"), recorder.stage("b"):
        raise KeyError
    with recorder.stage("c"):
        pass
    assert {name: stage.count for name, stage in recorder.timings().items()} == {"a": 1, "b": 1, "c": 1}


def test_threads_nest_their_own_stages() -> None:
    recorder = RunRecorder()

    def work() -> None:
        for _ in range(50):
            with recorder.stage("thread"):
                recorder.event(Message("tick"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with recorder.stage("main"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    times = recorder.timings()
    assert times["thread"].count == 200
    assert times["main"].own_seconds == times["main"].seconds


def test_stage_seconds_is_the_difference() -> None:
    recorder = RunRecorder()
    with recorder.stage("old"):
        pass
    before = recorder.timings()
    with recorder.stage("new"):
        pass
    assert list(stage_seconds(before, recorder.timings())) == ["new"]


def test_overhead_is_small() -> None:
    recorder = RunRecorder()
    start = time.thread_time()  # of this thread: others may have the core meanwhile
    for _ in range(10_000):
        with recorder.stage("x"):
            pass
    assert time.thread_time() - start < 1.0


def test_null_recorder_does_nothing() -> None:
    recorder = NullRecorder()
    with recorder.stage("x"):
        recorder.event(Message("y"))


def play(display: Any) -> None:
    recorder = RunRecorder([display])
    with display:
        for event in RUN:
            recorder.event(event)


def test_json_lines_have_one_object_an_event() -> None:
    stream = io.StringIO()
    play(JsonLines(stream))
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["event"] for record in records] == [event.kind for event in RUN]
    assert records[3]["step"] == 0 and all(isinstance(record["time"], float) for record in records)


def test_quiet_shows_warnings_only() -> None:
    stream = io.StringIO()
    display = make_display("rich", True, stream)
    assert isinstance(display, Quiet)
    play(display)
    assert stream.getvalue() == "warning: [odd] note\n"


def test_bars_name_the_request_and_the_result() -> None:
    stream = io.StringIO()
    display = make_display("rich", False, stream)
    assert isinstance(display, Bars)
    play(display)
    shown = stream.getvalue()
    assert "[a].mp4: 33 frames in 2 windows" in shown and "window 1 of 2 done in 1.5 s" in shown
    assert "[odd] note" in shown and "out/[a].mp4: 33 frames in 3.0 s" in shown


def test_bars_name_the_preview() -> None:
    stream = io.StringIO()
    started = RequestStarted(0, "a.mp4", 9, windows=2, steps=1, resumed_windows=0, preview="o/a.partial.mp4")
    Bars(Console(file=stream, width=100))(started)
    assert "preview, grows with every window: o/a.partial.mp4" in stream.getvalue()


def test_bars_on_a_terminal() -> None:
    stream = io.StringIO()
    play(Bars(Console(file=stream, force_terminal=True, width=100)))
    assert "window 1 of 2" in stream.getvalue()


def test_events_reach_every_listener() -> None:
    seen: list[Event] = []
    recorder = RunRecorder([seen.append] * 2)
    step = StepFinished(window=0, step=1, steps=4, action="compute", passes=2)
    recorder.event(step)
    assert seen == [step, step]
    assert step.kind == "step"
    assert step.as_dict() == {"window": 0, "step": 1, "steps": 4, "action": "compute", "passes": 2}
