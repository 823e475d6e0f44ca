"""Recorders: where a run reports its stage times and its progress events.

`NullRecorder` does nothing. `RunRecorder` adds up the wall-clock time of each named stage, with and
without the stages nested in it, and hands every event to its listeners (progress bars, JSON lines).
Times are of the host: work still queued on a GPU when a stage ends counts for the stage that waits for
it. A stage costs about a microsecond; each thread nests its own stages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class StageTime:
    """Summed time of one stage name: `own_seconds` leaves out the stages nested in it."""

    seconds: float = 0.0
    own_seconds: float = 0.0
    count: int = 0


class NullRecorder:
    """Reports nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def event(self, name: str, /, **fields: Any) -> None:
        return None


class RunRecorder:
    """Sums stage times and forwards events to `listeners`, called as `listener(name, fields)`."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = tuple(listeners)
        self._times: dict[str, StageTime] = {}
        self._lock = threading.RLock()
        self._local = threading.local()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`; also when it raises."""
        nested: list[float] = self._nested()
        nested.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            inside = nested.pop()
            if nested:
                nested[-1] += seconds
            with self._lock:
                old = self._times.get(name, StageTime())
                self._times[name] = StageTime(
                    old.seconds + seconds, old.own_seconds + seconds - inside, old.count + 1
                )

    def event(self, name: str, /, **fields: Any) -> None:
        """Hand the event to every listener, in order; events of several threads are not interleaved."""
        with self._lock:
            for listener in self._listeners:
                listener(name, fields)

    def timings(self) -> dict[str, StageTime]:
        """Times of every stage so far, in the order the stages first ended."""
        with self._lock:
            return dict(self._times)

    def _nested(self) -> list[float]:
        """Seconds spent in nested stages, one sum for each stage this thread is in."""
        stack: list[float] | None = getattr(self._local, "nested", None)
        if stack is None:
            stack = self._local.nested = []
        return stack


def stage_seconds(before: Mapping[str, StageTime], after: Mapping[str, StageTime]) -> dict[str, float]:
    """Seconds each stage took between two `timings()`, for the stages that ran."""
    spent = {name: time.seconds - before.get(name, StageTime()).seconds for name, time in after.items()}
    return {name: seconds for name, seconds in spent.items() if seconds > 0}
