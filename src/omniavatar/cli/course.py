"""How far a video is, from its events and the time: what the progress bar shows.

Each window is one unit. Its steps fill the share of the unit that steps took in the window before. Decoding
and writing fill the rest, ever more slowly, because nothing reports how far they are. On a GPU a step counts
when its work is queued, so most of a window's time is in that rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from omniavatar.engine.events import RequestStarted, StepFinished, WindowFinished, WindowStarted
from omniavatar.types import Event

FIRST_STEP_SHARE = 0.5
"""The share of a window's time that its steps take, before one was measured."""
ENDING = 0.01
"""What is left of the bar when the last window is written, as a part of all windows."""


class Course:
    """The course of one video. clock: gives the time in seconds."""

    def __init__(self, started: RequestStarted, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.total = started.windows * (1 + ENDING)
        self.text = "loading the models"
        self._windows = started.windows
        self._reached = float(started.resumed_windows)
        self._step_share = FIRST_STEP_SHARE
        self._began = clock()
        self._decoding: tuple[float, float] | None = None
        """When decoding began, and how far the video was."""
        self._decoding_s = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case WindowStarted():
                self._began, self._decoding = self._clock(), None
                self._reach(event.window, f"window {event.window + 1} of {self._windows}")
            case StepFinished():
                self._step(event)
            case WindowFinished():
                self._window_finished(event)

    def done(self) -> float:
        """Windows that are done, with the part of the current one; never less than before."""
        if self._decoding is not None:
            since, reached = self._decoding
            expected = self._decoding_s or max(since - self._began, 1.0)
            rest = (1 - self._step_share) * (1 - math.exp(-(self._clock() - since) / expected))
            self._reached = max(self._reached, reached + rest)
        return self._reached

    def _reach(self, done: float, text: str) -> None:
        self._reached, self.text = max(self._reached, done), text

    def _step(self, event: StepFinished) -> None:
        number, step = f"window {event.window + 1} of {self._windows}", event.step + 1
        done = event.window + self._step_share * step / event.steps
        if step < event.steps:
            self._reach(done, f"{number}, step {step} of {event.steps}")
        else:
            self._reach(done, f"{number}, decoding")
            self._decoding = self._clock(), done

    def _window_finished(self, event: WindowFinished) -> None:
        now = self._clock()
        if self._decoding is not None and now > self._decoding[0] > self._began:
            since = self._decoding[0]
            self._step_share = (since - self._began) / (now - self._began)
            self._decoding_s = now - since
        self._decoding = None
        last = event.window + 1 == self._windows
        self._reach(event.window + 1, "writing the video" if last else self.text)
