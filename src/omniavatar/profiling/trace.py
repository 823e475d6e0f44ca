"""A recorder that keeps every stage and every denoising step, for `omniavatar profile`.

`TraceRecorder` is a `RunRecorder` that also remembers when each stage began and ended. On a GPU it waits for
the device at the edges of each stage and after each step, so that a time is that of the work and not of its
queueing; an ordinary run has no such waits. Only the thread that made the recorder waits: the thread that
writes the video must not stand in the model's way. A step lasts from the end of the one before (the first:
from the start of its "denoise" stage). Without a GPU a span costs some microseconds.

`chrome_trace` is the form that Perfetto (ui.perfetto.dev) and chrome://tracing load.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from omniavatar.profiling.recorder import Listener, RunRecorder

STEP = "step"
DENOISE = "denoise"


@dataclass(frozen=True)
class Span:
    """Something that took from `start` to `end` (seconds of one clock), on one thread.

    depth: stages of the thread around it. window, request: numbers from 0, None outside of one.
    details: step and action of a step.
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


class TraceRecorder(RunRecorder):
    """Remembers spans. `wait` blocks until the device has done what was queued (default: nothing to do)."""

    def __init__(self, listeners: Sequence[Listener] = (), wait: Callable[[], None] | None = None) -> None:
        super().__init__(listeners)
        self._wait = wait
        self._owner = threading.get_ident()
        self._spans: list[Span] = []
        self._step_start: float | None = None
        self._request: int | None = None
        self._requests = 0
        self._window: int | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._settle()
        depth = len(self._nested())
        request, window = self._request, self._window if self._is_owner() else None
        start = time.perf_counter()
        if name == DENOISE:
            self._step_start = start
        try:
            with super().stage(name):
                try:
                    yield
                finally:
                    self._settle()
        finally:
            end = time.perf_counter()
            self._spans.append(Span(name, start, end, threading.get_ident(), depth, request, window))

    def event(self, name: str, /, **fields: Any) -> None:
        match name:
            case "step":
                self._step(fields)
            case "request_started":
                self._request, self._requests = self._requests, self._requests + 1
                self._window = None
            case "window_started":
                self._window = fields["window"]
            case "request_finished":
                self._request = self._window = None
        super().event(name, **fields)

    def spans(self) -> tuple[Span, ...]:
        """Everything that has ended, in the order of its beginning."""
        return tuple(sorted(self._spans, key=lambda span: (span.start, span.depth)))

    def _step(self, fields: dict[str, Any]) -> None:
        self._settle()
        now = time.perf_counter()
        start = now if self._step_start is None else self._step_start
        details = {"step": fields["step"], "action": fields["action"]}
        self._spans.append(
            Span(
                STEP,
                start,
                now,
                threading.get_ident(),
                len(self._nested()),
                self._request,
                self._window,
                details,
            )
        )
        self._step_start = now

    def _settle(self) -> None:
        if self._wait is not None and self._is_owner():
            self._wait()

    def _is_owner(self) -> bool:
        return threading.get_ident() == self._owner


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Spans as the Trace Event Format: microseconds from the first span, one row a thread."""
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
