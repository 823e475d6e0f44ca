"""Recorders: where a run reports its stage times and its progress events.

`NullRecorder` does nothing. `RunRecorder` adds up the wall-clock time of each named stage, with and
without the stages nested in it, and hands every event to its listeners (progress bars, JSON lines).
Times are the host's, unless a thread names another clock by `use_clock` (a run on a GPU queues its work ahead
and is timed on the GPU's own timeline). A stage costs some microseconds; each thread nests its own stages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from omniavatar.engine.clocks import Clock, HostClock
from omniavatar.types import Event

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class StageTime:
    """Summed time of one stage name: `own_seconds` leaves out the stages nested in it."""

    seconds: float = 0.0
    own_seconds: float = 0.0
    count: int = 0


@dataclass(eq=False, slots=True)
class MarkedStage:
    """A stage between two marks of its clock, and the stages nested in it."""

    name: str
    clock: Clock
    start: Any
    end: Any = None
    inside: list[MarkedStage] = field(default_factory=list)


class NullRecorder:
    """Reports nothing."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def event(self, event: Event) -> None:
        return None


class RunRecorder:
    """Sums stage times and forwards events to `listeners`, called as `listener(event)`."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = tuple(listeners)
        self._times: dict[str, StageTime] = {}
        self._ended: list[MarkedStage] = []
        self._host = HostClock()
        self._lock = threading.RLock()
        self._local = threading.local()

    def use_clock(self, clock: Clock) -> None:
        """Time the stages of the calling thread by `clock` from now on."""
        self._local.clock = clock

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`; also when it raises."""
        clock, stack = self._clock(), self._nested()
        stage = MarkedStage(name, clock, clock.mark())
        stack.append(stage)
        try:
            yield
        finally:
            stage.end = clock.mark()
            stack.pop()
            if stack:
                stack[-1].inside.append(stage)
            else:
                with self._lock:
                    if clock.queued:
                        self._ended.append(stage)
                    else:
                        self._add(stage)

    def event(self, event: Event) -> None:
        """Hand the event to every listener, in order; events of several threads are not interleaved."""
        with self._lock:
            for listener in self._listeners:
                listener(event)

    def timings(self) -> dict[str, StageTime]:
        """Times of every outermost stage that has ended and of those in it, in the order of their ends.

        Waits for the device where its clock is used.
        """
        with self._lock:
            ended, self._ended = self._ended, []
            for stage in ended:
                self._add(stage)
            return dict(self._times)

    def _add(self, stage: MarkedStage) -> float:
        inside = sum(self._add(each) for each in stage.inside)
        seconds = stage.clock.seconds(stage.start, stage.end)
        old = self._times.get(stage.name, StageTime())
        self._times[stage.name] = StageTime(
            old.seconds + seconds, old.own_seconds + seconds - inside, old.count + 1
        )
        return seconds

    def _clock(self) -> Clock:
        """The clock of this thread."""
        clock: Clock = getattr(self._local, "clock", self._host)
        return clock

    def _nested(self) -> list[MarkedStage]:
        """The stages this thread is in."""
        stack: list[MarkedStage] | None = getattr(self._local, "nested", None)
        if stack is None:
            stack = self._local.nested = []
        return stack


class Elapsed:
    """Time since this was made, in all and by stage."""

    def __init__(self, recorder: RunRecorder) -> None:
        self._recorder, self._before = recorder, recorder.timings()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def stages(self) -> dict[str, float]:
        """Seconds of each stage that ran; waits for the device where its clock is used."""
        return stage_seconds(self._before, self._recorder.timings())


def stage_seconds(before: Mapping[str, StageTime], after: Mapping[str, StageTime]) -> dict[str, float]:
    """Seconds each stage took between two `timings()`, for the stages that ran."""
    spent = {name: time.seconds - before.get(name, StageTime()).seconds for name, time in after.items()}
    return {name: seconds for name, seconds in spent.items() if seconds > 0}
