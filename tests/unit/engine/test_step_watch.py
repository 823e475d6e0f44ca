"""Callbacks and the progress bar of each step, and the plan of a request."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from engine import causal_pipeline, request
from omniavatar import StoppedError
from omniavatar.errors import InputError

SHORT = request(0.15)
"""One window of two steps."""


class Calls:
    """A callback that keeps what it gets and spoils its copy of the latents."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.seen: list[tuple[Any, int, float, dict[str, Any]]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, pipe: Any, step: int, timestep: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value.clone() if name == "latents" else value for name, value in kwargs.items()}
        self.seen.append((pipe, step, timestep, kept))
        if "latents" in kwargs:
            kwargs["latents"].zero_()
        if self.interrupt_at == len(self.seen):
            pipe.interrupt = True
        return kwargs


def test_it_gets_every_step_and_changes_no_byte(pipeline, whole, tmp_path):
    calls = Calls()
    made = pipeline.generate(request(0.7), tmp_path / "x.mp4", callback_on_step_end=calls)
    assert made.output.read_bytes() == whole
    assert [(kwargs["window"], step) for _, step, _, kwargs in calls.seen] == list(
        product(range(3), range(2))
    )
    pipe, _, timestep, kwargs = calls.seen[0]
    assert pipe is pipeline and timestep == 1000.0 and kwargs["windows"] == 3
    assert kwargs["latents"].shape == (1, 16, 4, 8, 8) and kwargs["latents"].dtype == torch.float32
    assert not torch.equal(kwargs["latents"], calls.seen[1][3]["latents"])


def test_latents_are_left_out_when_they_are_not_wanted(pipeline):
    calls = Calls()
    list(pipeline.stream(SHORT, callback_on_step_end=calls, callback_on_step_end_tensor_inputs=()))
    assert [set(kwargs) for *_, kwargs in calls.seen] == [{"window", "windows"}] * 2


@pytest.mark.parametrize("at, kept", [(1, 0), (3, 1)])
def test_interrupt_ends_the_run_and_finished_windows_are_kept(pipeline, whole, tmp_path, at, kept):
    calls, out = Calls(interrupt_at=at), tmp_path / "x.mp4"
    with pytest.raises(StoppedError, match=f"window {kept + 1} of 3"):
        pipeline.generate(request(0.7), out, callback_on_step_end=calls)
    assert len(calls.seen) == at
    assert not out.exists()
    made = pipeline.generate(request(0.7), out, callback_on_step_end=(later := Calls()))
    assert made.resumed_windows == kept and made.output.read_bytes() == whole
    assert later.seen[0][3]["window"] == kept


def test_stream_calls_it_too(pipeline):
    calls = Calls()
    (watched,) = pipeline.stream(SHORT, callback_on_step_end=calls)
    (plain,) = pipeline.stream(SHORT)
    assert len(calls.seen) == 2 and np.array_equal(watched.frames, plain.frames)
    with pytest.raises(StoppedError):
        list(pipeline.stream(SHORT, callback_on_step_end=Calls(interrupt_at=1)))


def test_a_stream_that_is_left_open_does_not_disturb_the_next_run(pipeline):
    calls, later = Calls(), Calls()
    left = pipeline.stream(SHORT, callback_on_step_end=calls)
    next(left)
    running = pipeline.stream(request(0.7), callback_on_step_end=later)
    next(running)
    left.close()
    next(running)
    running.close()
    assert len(later.seen) == 4 and len(calls.seen) == 2


def test_causal_blocks_are_reported(nano_checkpoint, cache):
    pipeline, calls = causal_pipeline(nano_checkpoint, cache), Calls()
    plain = [chunk.frames for chunk in pipeline.stream(SHORT)]
    watched = [chunk.frames for chunk in pipeline.stream(SHORT, callback_on_step_end=calls)]
    assert all(np.array_equal(one, other) for one, other in zip(watched, plain, strict=True))
    assert len(calls.seen) == 2 * len(plain) and calls.seen[0][3]["latents"].shape[2] == 2


@pytest.mark.parametrize(
    "returned, match",
    [
        ({"latents": torch.zeros(1)}, "returned other latents"),
        (True, "returned bool"),
    ],
)
def test_what_it_returns_is_checked(pipeline, tmp_path, returned, match):
    with pytest.raises(InputError, match=match):
        pipeline.generate(SHORT, tmp_path / "x.mp4", callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize("returned", [None, {}])
def test_it_may_return_nothing(pipeline, returned):
    assert len(list(pipeline.stream(SHORT, callback_on_step_end=lambda *_: returned))) == 1


@pytest.mark.parametrize("names", ["latents", ["prompt_embeds"]])
def test_unknown_tensors_are_refused(pipeline, names):
    with pytest.raises(InputError, match="give a list of latents"):
        next(pipeline.stream(SHORT, callback_on_step_end=Calls(), callback_on_step_end_tensor_inputs=names))


def test_its_exception_reaches_the_caller(pipeline, tmp_path):
    def fail(*_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipeline.generate(SHORT, tmp_path / "x.mp4", callback_on_step_end=fail)


def test_without_callback_and_bar_nothing_of_it_is_imported(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "omniavatar.engine.step_watch", None)
    assert len(list(pipeline.stream(SHORT))) == 1
    with pytest.raises(ImportError):
        list(pipeline.stream(SHORT, callback_on_step_end=Calls()))


@pytest.fixture
def shown(pipeline) -> Iterator[io.StringIO]:
    """What the bar prints."""
    printed = io.StringIO()
    pipeline.set_progress_bar_config(file=printed, desc="face", ascii=True, mininterval=0)
    yield printed
    pipeline.set_progress_bar_config(disable=True)


def test_the_bar_counts_the_steps_that_are_left(pipeline, whole, tmp_path, shown):
    out = tmp_path / "x.mp4"
    with pytest.raises(StoppedError):
        pipeline.generate(request(0.7), out, callback_on_step_end=Calls(interrupt_at=3))
    assert "3/6" in shown.getvalue() and "6/6" not in shown.getvalue()
    assert pipeline.generate(request(0.7), out).output.read_bytes() == whole
    assert "face: 100%" in shown.getvalue() and "4/4" in shown.getvalue()
    pipeline.set_progress_bar_config(disable=True)
    shown.truncate(0)
    list(pipeline.stream(SHORT))
    assert not shown.getvalue()


def test_a_bar_for_the_callers_own_loop(pipeline):
    assert list(pipeline.progress_bar(range(3))) == [0, 1, 2]
    with pipeline.progress_bar(total=2) as bar:
        bar.update()


def test_the_plan_says_what_is_made(pipeline):
    planned, (made,) = pipeline.plan(SHORT), pipeline.stream(SHORT)
    assert (planned["frames"], planned["windows"], planned["steps"]) == (len(made.frames), made.windows, 2)
    assert planned["size"] == (64, 64) and planned["memory"]["device_peak"] > 0
