"""The clock of a live session: which sound goes into a block, when a block is made, when a frame is shown.

It has no thread and reads no clock; callers pass the time. One rule keeps sound and picture together: a block
takes a stretch of the sound, and its frames leave with exactly this stretch.
- A block is begun as late as possible, so that it holds the newest sound, and never more than one block
  before it is shown.
- Sound that starts in the middle of a block ends with it: silence comes first. So sound that arrives in real
  time flows on without gaps.
- While sound flows, a block waits `GRACE_S` for a late piece. Then silence follows.
- A block that is late moves the clock: the picture stands still for that long, and nothing is lost.
- A model that is too slow for real time gives up a block of silence as soon as sound arrives.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, inf
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar.live.chunk import LiveChunk
from omniavatar.live.maker import MODEL_RATE
from omniavatar.live.sound import SoundLine, Stretch, is_speech, newest, samples_of

if TYPE_CHECKING:
    from collections.abc import Mapping

GRACE_S = 0.12
MARGIN_S = 0.02
LATE_S = 1.0
"""A chunk that nobody took this long after its time is dropped."""
MOST_FRAMES = 4
"""Frames of a chunk."""
_HELD = 160
"""Samples that two resamplers may hold back."""
_REMEMBERED = 20


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A chunk that waits for its time. sounding: some of its sound was pushed."""

    chunk: LiveChunk
    due: float
    first_frame: int
    arrived: float | None


class Timeline:
    """Sound in, chunks out.

    rate: samples a second of the sound that leaves.
    """

    def __init__(self, fps: Fraction, rate: int) -> None:
        self.fps, self.rate = fps, rate
        self.queue = SoundLine()
        self._fed = SoundLine()  # in the model, not shown yet
        self._out: deque[_Waiting] = deque()
        self._flowing = self._ended = self._discarding = False
        self._last_push = -inf
        self._origin: float | None = None
        self._made = 0  # frames, as the sound counts them
        self._next = 0  # frames, as the clock counts them
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._period = 0.0
        self._began = 0.0
        self.blocks = self.dropped = self.stalls = 0

    # Sound

    def push(self, samples: np.ndarray, now: float) -> None:
        """Append sound (n,) int16 at `rate`."""
        self.queue.append(samples, now)
        self._last_push, self._ended = now, False
        if self._is_slow(self._period) and not self._sounding:
            self._discarding = True

    def end_speech(self) -> None:
        """No block waits for more sound until some is pushed."""
        self._ended = True

    @property
    def waiting(self) -> float:
        """Seconds of sound that no block has taken."""
        return len(self.queue) / self.rate

    @property
    def idle(self) -> bool:
        """Whether all pushed sound has been handed over or dropped."""
        return not self.queue and not self._sounding and all(each.arrived is None for each in self._out)

    @property
    def _sounding(self) -> bool:
        """Whether the model has pushed sound that is not shown yet."""
        return any(each.arrived is not None for each in self._fed)

    # Blocks

    def start_at(self, now: float, frames: int, missing: int) -> float:
        """When the next block, of `frames` frames, is to be begun.

        missing: model samples that the block still needs.
        """
        period = float(frames / self.fps)
        lacks = len(self.queue) < self._needed(missing)
        hopes = lacks and not self._ended and now < self._last_push + GRACE_S
        if self._origin is None:
            return now
        begin = self.due - min(self.longest + MARGIN_S, period)
        waits = hopes and (self._flowing or self._is_slow(period))
        return max(begin, self._last_push + GRACE_S) if waits else begin

    @property
    def due(self) -> float:
        """When the first frame of the next block is to be shown; minus infinity for the first block."""
        return -inf if self._origin is None else self._origin + float(self._next / self.fps)

    def begin(self, now: float, frames: int, missing: int) -> np.ndarray:
        """The sound (n,) int16 to give to the model for the next block."""
        self._began, self._period, self._discarding = now, float(frames / self.fps), False
        count = self._needed(missing)
        silence = max(0, count - len(self.queue))
        pad = [Stretch(np.zeros(silence, np.int16), None)] if silence else []
        taken = self.queue.take(count)
        given = [*taken, *pad] if self._flowing else [*pad, *taken]
        if count:
            self._flowing = not silence or (not self._flowing and bool(taken))
        for each in given:
            self._fed.append(each.samples, each.arrived)
        return samples_of(given)

    def add(self, frames: np.ndarray, now: float) -> None:
        """A piece of the block that was begun, (n, H, W, 3) uint8."""
        for start in range(0, len(frames), MOST_FRAMES):
            piece = frames[start : start + MOST_FRAMES]
            sound = self._fed.take(self._samples(self._made + len(piece)) - self._samples(self._made))
            self._made += len(piece)
            if not self._discarding:
                samples = samples_of(sound)
                due = self._due(now)
                time = float(self._next / self.fps)
                chunk = LiveChunk(piece, samples, time, self.fps, self.rate, is_speech(samples))
                self._out.append(_Waiting(chunk, due, self._next, newest(sound)))
                self._next += len(piece)
        self._drop_late(now)

    def finish(self, now: float) -> None:
        """The block is complete."""
        self.blocks += 1
        if self.blocks > 1:  # the first one warms up
            self._times.append(now - self._began)

    def skip(self, frames: int) -> None:
        """The block that was begun is left out, with its sound."""
        self._fed.take(self._samples(self._made + frames) - self._samples(self._made))
        self._made += frames

    @property
    def discarding(self) -> bool:
        """Whether the block in the making is not to be shown."""
        return self._discarding

    # Chunks

    def take(self, now: float) -> LiveChunk | float | None:
        """The next chunk if its time has come, else when it comes; None if no chunk waits."""
        self._drop_late(now)
        if not self._out:
            return None
        first = self._out[0]
        if first.due > now:
            return first.due
        self._out.popleft()
        delay = None if first.arrived is None else now - first.arrived
        return replace(first.chunk, delay=delay)

    def interrupt(self) -> None:
        """Drop the sound that no block took, and the frames of sound that were not handed over."""
        self.queue.clear()
        self._flowing, self._ended = False, True
        in_the_making = self._sounding
        self._fed.silence()
        kept = 0
        while kept < len(self._out) and self._out[kept].arrived is None:
            kept += 1
        if kept < len(self._out):
            self._next = self._out[kept].first_frame
            while len(self._out) > kept:
                self._out.pop()
            in_the_making = True
        self._discarding = self._discarding or in_the_making

    def state(self) -> dict[str, Any]:
        """Where it is, and the sound that the model has but nobody heard."""
        return {"made": self._made, "next": self._next, "flowing": self._flowing,
                "fed": samples_of(list(self._fed))}  # fmt: skip

    def restore(self, state: Mapping[str, Any], now: float) -> None:
        """Continue from a `state`."""
        self._made, self._next, self._flowing = state["made"], state["next"], state["flowing"]
        self._fed.clear()
        self._fed.append(state["fed"], now)

    # Measured times

    @property
    def measured(self) -> bool:
        """Whether the time of a block is known."""
        return len(self._times) > 0

    @property
    def longest(self) -> float:
        """Seconds of the slowest of the newest blocks."""
        return max(self._times, default=0.0)

    @property
    def usual(self) -> float | None:
        """Median seconds of the newest blocks; None before the second one."""
        return statistics.median(self._times) if self._times else None

    @property
    def period(self) -> float:
        """Seconds that the newest block is shown."""
        return self._period

    @property
    def frames(self) -> int:
        """Frames made so far."""
        return self._made

    def _is_slow(self, period: float) -> bool:
        return self.usual is not None and self.usual > period

    def _samples(self, frames: int) -> int:
        """Samples of the first `frames` frames."""
        return int(frames * self.rate / self.fps)

    def _needed(self, missing: int) -> int:
        """Samples to take for `missing` model samples."""
        return ceil(missing * self.rate / MODEL_RATE) + _HELD if missing > 0 else 0

    def _due(self, now: float) -> float:
        """When the next frame is shown; a late one moves the clock."""
        shown = float(self._next / self.fps)
        if self._origin is None:
            self._origin = now - shown
        due = self._origin + shown
        if due < now:
            self._origin += now - due
            self.stalls += now - due > 1 / self.fps
            return now
        return due

    def _drop_late(self, now: float) -> None:
        while self._out and now > self._out[0].due + LATE_S:
            self.dropped += len(self._out.popleft().chunk.frames)
