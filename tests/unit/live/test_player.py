"""A session's player on a clock of the test: answers after interruptions, and what a saved session hears."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from live_makers import LoudnessMaker, tone
from omniavatar.errors import StoppedError
from omniavatar.live import LiveChunk
from omniavatar.live.player import Player
from omniavatar.live.state import load_state, restore, save_state


class TimedMaker(LoudnessMaker):
    """Makes a block in `seconds` of a clock that it moves itself.

    on_step: called at each of its five steps.
    """

    def __init__(self, seconds: float, on_step: Callable[[], None]) -> None:
        super().__init__(block=12)
        self.needs, self.now, self.on_step = seconds, 0.0, on_step

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        frames = list(super().make(stop))
        for _ in range(5):
            self.now += self.needs / 5
            self.on_step()
            if stop():
                raise StoppedError("stopped")
        yield from frames


@pytest.mark.parametrize(("speaking", "most"), [(True, 0.0), (False, 0.48)])
@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_an_answer_after_an_interruption_at_any_moment(speaking: bool, most: float, seconds: float) -> None:
    """Speech gives way at the next step; a silent face listens at most one block (0.48 s) later."""

    def wait(moment: float) -> float:
        """Seconds from the interruption and the answer's arrival to its first frame."""
        asked = heard = None

        def look() -> None:
            nonlocal asked, heard
            while isinstance(chunk := player.take(), LiveChunk):
                if asked is not None and heard is None and chunk.speaking:
                    heard = maker.now
            if asked is None and maker.now >= moment:
                asked = maker.now
                player.interrupt()
                player.push(tone(3.0), 16000)

        maker = TimedMaker(seconds, look)
        player = Player(maker, threading.Condition(), 16000, lambda: maker.now)
        if speaking:
            player.push(tone(20.0), 16000)
        while heard is None:
            look()
            if (start := player.start_at(maker.now)) <= maker.now:
                player.perform()
            else:
                maker.now = min(start, maker.now + 0.02)
        assert asked is not None
        return heard - asked

    waits = [wait(2 + index * 0.083) for index in range(7)]
    handed_over, step = 0.16, seconds / 5
    assert max(waits) <= most + max(seconds + step, handed_over) + 0.03 and min(waits) > 0


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_a_saved_session_hears_the_same_as_the_one_that_went_on(rate: int, tmp_path: Path) -> None:
    """What the resampler between the session's rate and the model's holds back is not lost."""

    def new() -> Player:
        return Player(LoudnessMaker(), threading.Condition(), rate, lambda: now)

    def shown(player: Player) -> list[tuple[np.ndarray, np.ndarray]]:
        nonlocal now
        found = []
        while (chunk := player.take()) is not None:
            if isinstance(chunk, LiveChunk):
                found.append((chunk.frames, chunk.audio))
            else:
                now += chunk
        return found

    now = 0.0
    noise = np.random.default_rng(0).normal(0, 0.2, rate).astype(np.float32)
    whole, resumed = new(), new()
    whole.push(noise, rate)
    whole.perform()
    save_state(whole, tmp_path / "session")
    shown(whole)
    restore(resumed, load_state(tmp_path / "session"))
    resumed.push(noise[-len(whole.timeline.queue) :], rate)
    for _ in range(3):
        whole.perform()
        expected = shown(whole)
        resumed.perform()
        for one, other in zip(expected, shown(resumed), strict=True):
            assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
