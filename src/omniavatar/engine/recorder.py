"""Recorders: a run reports its stage times and progress events to one.

`NullRecorder` does nothing. `RunRecorder` sums the wall-clock time of each named stage, with and without its
nested stages, and passes every event to its listeners (progress bars, JSON lines). It uses the host's clock,
unless a thread selects another with `use_clock`: a GPU run queues work ahead, so the GPU's timeline times it.
A stage costs a few microseconds. Each thread nests its own stages.
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
MOST_QUEUED = 1024
"""Ended stages of a queued clock that are kept until their times are read; the device has reached older ones
long ago."""


@dataclass(frozen=True)
class StageTime:
    """Summed time of one stage name. `own_seconds` excludes nested stages."""

    seconds: float = 0.0
    own_seconds: float = 0.0
    count: int = 0


@dataclass(eq=False, slots=True)
class MarkedStage:
    """A stage, as two marks of its clock, and the stages nested in it."""

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
    """Sums stage times, and calls each listener for every event, as `listener(event)`.

    A listener is called in the thread in which the event happens, and that thread waits for it.
    """

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = tuple(listeners)
        self._times: dict[str, StageTime] = {}
        self._ended: list[MarkedStage] = []
        self._host = HostClock()
        self._lock = threading.RLock()
        self._local = threading.local()

    def use_clock(self, clock: Clock) -> None:
        """Use `clock` for later stages of the calling thread."""
        self._local.clock = clock

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body under `name`, even if it raises."""
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
                        self._add_ended(MOST_QUEUED)
                    else:
                        self._add(stage)

    def event(self, event: Event) -> None:
        """Call every listener in order. Events of several threads do not interleave.

        An exception of a listener ends the run and reaches the caller, also from the thread of the writer.
        """
        with self._lock:
            for listener in self._listeners:
                listener(event)

    def timings(self) -> dict[str, StageTime]:
        """Times by stage name, in the order in which stages ended.

        An outermost stage counts when it has ended, together with the stages nested in it.
        Waits for the device if a stage was timed by its clock.
        """
        with self._lock:
            self._add_ended(0)
            return dict(self._times)

    def _add_ended(self, most: int) -> None:
        """Add the times of ended stages, the oldest first, until at most `most` are left."""
        if len(self._ended) <= most:
            return
        kept = self._ended[len(self._ended) - most // 2 :]
        for stage in self._ended[: len(self._ended) - len(kept)]:
            self._add(stage)
        self._ended = kept

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
        """The stages that are open in this thread, outermost first."""
        stack: list[MarkedStage] | None = getattr(self._local, "nested", None)
        if stack is None:
            stack = self._local.nested = []
        return stack


class Elapsed:
    """Time since this object was created, in total and by stage."""

    def __init__(self, recorder: RunRecorder) -> None:
        self._recorder, self._before = recorder, recorder.timings()
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def stages(self) -> dict[str, float]:
        """Seconds of each stage that ran. Waits for the device if a stage was timed by its clock."""
        return stage_seconds(self._before, self._recorder.timings())


def stage_seconds(before: Mapping[str, StageTime], after: Mapping[str, StageTime]) -> dict[str, float]:
    """Seconds of each stage between two `timings()`; stages that did not run are left out."""
    spent = {name: total.seconds - before.get(name, StageTime()).seconds for name, total in after.items()}
    return {name: seconds for name, seconds in spent.items() if seconds > 0}
