"""Sound sources beside a model that is too slow for real time, and a pipe that ends within a sample."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from live_makers import tone
from media_files import write_audio
from omniavatar.errors import InputError
from omniavatar.live.chunk import LiveStats
from omniavatar.live.sources import (
    MOST_AHEAD_S,
    MOST_SPOKEN_S,
    FileSound,
    MicrophoneSound,
    PipeSound,
    SoundSource,
)


@dataclass
class StuckSession:
    """A session that shows nothing, so that all pushed sound waits."""

    rate: int = 16000
    pushed: list[np.ndarray] = field(default_factory=list)
    full: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def push_audio(self, pcm: np.ndarray, rate: int) -> None:
        self.pushed.append(pcm)

    def stats(self) -> LiveStats:
        waiting = sum(map(len, self.pushed)) / self.rate
        if waiting > MOST_AHEAD_S:
            self.full.set()
        return LiveStats(0, 0, 0, 0, waiting, None, 0.0, None)

    def end(self) -> None:
        self.ended.set()


def pipe_source(session: Any, folder: Path) -> SoundSource:
    return PipeSound(session, io.BytesIO((tone(30.0) * 32767).astype("<i2").tobytes()), 16000)


def file_source(session: Any, folder: Path) -> SoundSource:
    """A file of whose sound all is due at once, as that of a long one beside a slow model."""
    write_audio(folder / "talk.wav", tone(30.0)[None], 16000, "pcm_s16le", "mono")
    return FileSound(session, folder / "talk.wav", itertools.count(0, 1000).__next__)


@pytest.mark.parametrize("make", [pipe_source, file_source])
def test_the_rest_of_a_file_or_pipe_waits_where_it_is(
    make: Callable[[Any, Path], SoundSource], tmp_path: Path
) -> None:
    """A session takes two minutes of waiting sound; a longer file beside a slow model is no error."""
    session = StuckSession()
    with make(session, tmp_path) as source:
        for _ in range(2):  # it goes on when there is room
            assert session.full.wait(10)
            assert not session.ended.wait(0.2), "it waits for room"
            assert session.stats().waiting < MOST_AHEAD_S + 1.1
            session.pushed.clear()
            session.full.clear()
    assert session.ended.wait(5) and source.error is None


def test_a_microphone_leaves_out_what_nobody_will_hear_for_minutes(caplog: pytest.LogCaptureFixture) -> None:
    session: Any = StuckSession()
    microphone = MicrophoneSound(session)
    second = tone(1.0)
    for _ in range(round(MOST_SPOKEN_S) + 20):
        microphone.hear(second, 16000)
    assert MOST_SPOKEN_S < session.stats().waiting < MOST_SPOKEN_S + 2
    assert [each.getMessage().partition(":")[0] for each in caplog.records] == ["microphone"]
    session.pushed.clear()
    microphone.hear(second, 16000)
    assert session.pushed


def test_a_pipe_that_ends_within_a_sample_plays_and_says_so() -> None:
    session: Any = StuckSession()
    with PipeSound(session, io.BytesIO(bytes(3201)), 16000) as source:
        assert session.ended.wait(5)
    assert sum(map(len, session.pushed)) == 1600
    assert isinstance(source.error, InputError) and "ends within a sample" in str(source.error)
