"""One live session inside its stage: the maker, the timeline, and who waits for chunks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from omniavatar.errors import InputError, ResumeError, StoppedError
from omniavatar.live.chunk import LiveChunk, LiveStats
from omniavatar.live.maker import MODEL_RATE, BlockMaker
from omniavatar.live.sound import MOST_WAITING_S, Resampler, check_rate, mono, to_int16
from omniavatar.live.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class Player:
    """Sound goes in and chunks come out in any thread; blocks are made in the stage's thread.

    - condition: the stage's; it guards everything but the maker.
    - rate: samples a second of the sound that leaves.
    - clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, maker: BlockMaker, condition: threading.Condition, rate: int, clock: Callable[[], float]
    ) -> None:
        self.maker, self.rate = maker, rate
        self.timeline = Timeline(maker.fps, rate)
        self.memory: int | None = None
        self.error: Exception | None = None
        self.closed = False
        self._condition, self._clock = condition, clock
        self._to_model = Resampler(rate, MODEL_RATE)
        self._incoming: Resampler | None = None
        self._prompt: str | None = None
        self._ending = self._busy = False
        self._delay: float | None = None
        self._listeners: list[Callable[[], None]] = []

    # Any thread

    def push(self, pcm: Any, rate: Any) -> None:
        """Append sound. Raises InputError; the session goes on."""
        rate, samples = check_rate(rate), mono(pcm)
        with self._condition:
            self._check_open()
            seconds = self.timeline.waiting + len(samples) / rate
            if seconds > MOST_WAITING_S:
                raise InputError(
                    f"sound: {seconds:.0f} s would wait to be shown, the most is {MOST_WAITING_S:.0f}; "
                    "push it later, or interrupt first"
                )
            if self._incoming is None or self._incoming.rate != rate:
                self._flush()
                self._incoming = Resampler(rate, self.rate)
            self._append(self._incoming.push(samples))
            self._condition.notify_all()

    def end_speech(self) -> None:
        """No more sound follows soon."""
        with self._condition:
            self._flush()
            self.timeline.end_speech()
            self._condition.notify_all()

    def end(self) -> None:
        """No more sound follows: the session ends when the pushed sound has been shown."""
        with self._condition:
            self._flush()
            self.timeline.end_speech()
            self._ending = True
            self._wake()

    def interrupt(self) -> None:
        with self._condition:
            self._incoming = None
            self.timeline.interrupt()
            self._wake()

    def set_prompt(self, prompt: str) -> None:
        with self._condition:
            self._check_open()
            self._prompt = prompt
            self._condition.notify_all()

    def take(self) -> LiveChunk | float | None:
        """The next chunk, or seconds until it is due, or None if a `listen`er will be called.

        Raises EOFError at the end, and the session's error.
        """
        with self._condition:
            found = self.timeline.take(now := self._clock())
            if isinstance(found, LiveChunk):
                self._delay = found.delay if found.delay is not None else self._delay
                return found
            if found is not None:
                return found - now
            if self.error is not None:
                raise self.error
            if self.closed or (self._ending and self.timeline.idle and not self._busy):
                raise EOFError
            return None

    def next(self, seconds: float | None = None) -> LiveChunk | None:
        """Wait for the next chunk, at most `seconds`; None if none came. Raises as `take`."""
        end = None if seconds is None else self._clock() + seconds
        with self._condition:
            while not isinstance(found := self.take(), LiveChunk):
                left = None if end is None else end - self._clock()
                if left is not None and left <= 0:
                    return None
                waits = [each for each in (found, left) if each is not None]
                self._condition.wait(min(waits, default=None))
            return found

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever `take` may have something else, from any thread."""
        with self._condition:
            self._listeners.append(listener)

    def stats(self) -> LiveStats:
        with self._condition:
            line = self.timeline
            return LiveStats(
                line.blocks, line.frames, line.dropped, line.stalls, line.waiting, line.usual, line.period,
                self._delay,
            )  # fmt: skip

    # The stage's thread

    @property
    def share(self) -> float | None:
        """Part of the machine's time that this session takes; None before it is measured."""
        usual = self.timeline.usual
        return None if usual is None else usual / self.timeline.period

    @property
    def judged(self) -> bool:
        """Whether `share` is final for now: it is measured, or no block follows. The condition is held."""
        return self.share is not None or self._finished

    @property
    def _finished(self) -> bool:
        return self.closed or self.error is not None or (self._ending and self.timeline.idle)

    def start_at(self, now: float) -> float:
        """When the next block is to be begun. The condition is held."""
        if self._finished:
            return inf
        return self.timeline.start_at(now, self.maker.frames, self.maker.missing)

    @property
    def due(self) -> float:
        """When the next block is to be shown. The condition is held."""
        return self.timeline.due

    def perform(self) -> None:
        """Make the next block. The condition is not held."""
        maker = self.maker
        with self._condition:
            prompt, self._prompt = self._prompt, None
        if prompt is not None:
            maker.set_prompt(prompt)
        frames, shown = maker.frames, 0
        with self._condition:
            self._busy = True
            sound = self.timeline.begin(self._clock(), frames, maker.missing)
        try:
            maker.push(self._to_model.push(sound.astype(np.float32) / 32768))
            for piece in maker.make(self._stopped):
                with self._condition:
                    self.timeline.add(piece, self._clock())
                    shown += len(piece)
                    self._wake()
                if self.closed:
                    return
            with self._condition:
                self.timeline.finish(self._clock())
        except StoppedError:
            with self._condition:
                self.timeline.skip(frames - shown)
        finally:
            with self._condition:
                self._busy = False
                self._wake()

    def settle(self) -> None:
        """Give the model what the resampler held back, between two blocks.

        So a session that is saved here goes on as this one does.
        """
        self.maker.push(self._to_model.finish())
        self._to_model = Resampler(self.rate, MODEL_RATE)

    def clock_state(self) -> dict[str, Any]:
        """See `Timeline.state`; the rate is in it."""
        with self._condition:
            return {**self.timeline.state(), "rate": self.rate}

    def restore_clock(self, state: Mapping[str, Any]) -> None:
        """Continue from a `clock_state`. Raises ResumeError for another rate."""
        if state.get("rate") != self.rate:
            raise ResumeError(
                f"live session: was saved with sound at {state.get('rate')} samples a second, "
                f"not {self.rate}; open it with that rate"
            )
        with self._condition:
            self.timeline.restore(state, self._clock())

    def fail(self, error: Exception) -> None:
        """End the session with an error, which its reader gets after the last chunk."""
        with self._condition:
            self.error = error
            self._wake()

    def close(self) -> None:
        """End the session; the block in the making stops at its next step."""
        with self._condition:
            self.closed = True
            self.timeline.interrupt()
            self._wake()

    def _stopped(self) -> bool:
        return self.closed or self.timeline.discarding

    def _check_open(self) -> None:
        if self.closed or self._ending:
            raise InputError("session: it has ended; start another one")
        if self.error is not None:
            raise self.error

    def _append(self, samples: np.ndarray) -> None:
        self.timeline.push(to_int16(samples), self._clock())

    def _flush(self) -> None:
        """Take what the resampler of the last piece held back."""
        if self._incoming is not None:
            self._append(self._incoming.finish())
            self._incoming = None

    def _wake(self) -> None:
        self._condition.notify_all()
        for listener in self._listeners:
            listener()
