"""A recorder that keeps every stage and every denoising step, for `omniavatar profile`.

`TraceRecorder` is a `RunRecorder` that also keeps when each stage began and ended, by its thread's clock. The
thread that drives a GPU puts marks into the device's queue, so a time is that of the work and not of its
queueing, and nothing waits that does not wait in an ordinary run. A step lasts from the end of the previous
step (the first: from the start of its "denoise" stage). A span costs some microseconds.

`chrome_trace` makes the form that Perfetto (ui.perfetto.dev) and chrome://tracing load.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from omniavatar.engine.events import RequestFinished, RequestStarted, StepFinished, WindowStarted
from omniavatar.engine.recorder import Listener, MarkedStage, RunRecorder
from omniavatar.types import Event

STEP = "step"
DENOISE = "denoise"


@dataclass(frozen=True)
class Span:
    """A stage or step from `start` to `end` (seconds of one clock) on one thread.

    depth: number of stages around it. window, request: numbers from 0, None outside of one.
    details: number and action of a step.
    """

    name: str
    start: float
    end: float
    thread: int
    depth: int
    request: int | None
    window: int | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class _Kept:
    """A recorded stage or step, from which `span` is read later."""

    stage: MarkedStage
    thread: int
    depth: int
    request: int | None
    window: int | None
    details: dict[str, Any] = field(default_factory=dict)

    def span(self) -> Span:
        stage = self.stage
        start, seconds = stage.clock.moment(stage.start), stage.clock.seconds(stage.start, stage.end)
        where = self.thread, self.depth, self.request, self.window
        return Span(stage.name, start, start + seconds, *where, self.details)


class TraceRecorder(RunRecorder):
    """A `RunRecorder` that keeps spans."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        super().__init__(listeners)
        self._owner = threading.get_ident()
        self._kept: list[_Kept] = []
        self._step_start: Any = None
        self._request: int | None = None
        self._requests = 0
        self._window: int | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        depth, thread = len(self._nested()), threading.get_ident()
        window = self._window if thread == self._owner else None
        with super().stage(name):
            stage = self._nested()[-1]
            self._kept.append(_Kept(stage, thread, depth, self._request, window))
            if name == DENOISE:
                self._step_start = stage.start
            yield

    def event(self, event: Event) -> None:
        match event:
            case StepFinished():
                self._step(event)
            case RequestStarted():
                self._request, self._requests = self._requests, self._requests + 1
                self._window = None
            case WindowStarted():
                self._window = event.window
            case RequestFinished():
                self._request = self._window = None
        super().event(event)

    def spans(self) -> tuple[Span, ...]:
        """All stages and steps that have ended, by their start. Waits for a device that is timed."""
        spans = [kept.span() for kept in self._kept if kept.stage.end is not None]
        return tuple(sorted(spans, key=lambda span: (span.start, span.depth)))

    def _step(self, event: StepFinished) -> None:
        clock = self._clock()
        now = clock.mark()
        stage = MarkedStage(STEP, clock, now if self._step_start is None else self._step_start, now)
        details = {"step": event.step, "action": event.action}
        thread, depth = threading.get_ident(), len(self._nested())
        self._kept.append(_Kept(stage, thread, depth, self._request, self._window, details))
        self._step_start = now


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Spans in the Trace Event Format: microseconds from the first span, one row for each thread."""
    origin = min((span.start for span in spans), default=0.0)
    threads = {thread: number for number, thread in enumerate(dict.fromkeys(s.thread for s in spans))}
    process = os.getpid()
    events: list[dict[str, Any]] = [
        {
            "name": "thread_name",
            "ph": "M",
            "pid": process,
            "tid": number,
            "args": {"name": "model" if number == 0 else f"writer {number}"},
        }
        for number in threads.values()
    ]
    for span in spans:
        title = span.name
        if span.name == STEP:
            title = f"step {span.details['step']} ({span.details['action']})"
        known = {"request": span.request, "window": span.window}
        events.append(
            {
                "name": title,
                "cat": "step" if span.name == STEP else "stage",
                "ph": "X",
                "ts": (span.start - origin) * 1e6,
                "dur": span.seconds * 1e6,
                "pid": process,
                "tid": threads[span.thread],
                "args": {**{k: v for k, v in known.items() if v is not None}, **span.details},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
