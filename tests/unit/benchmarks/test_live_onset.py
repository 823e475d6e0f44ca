"""The benchmark that looks for a jump where speech begins, with a model that jumps."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.live_onset import kinds, speech_and_silence, watch

from live_makers import LoudnessMaker, tone

RATE = 16000


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def test_a_face_that_jumps_when_speech_begins_is_seen() -> None:
    seen = watch(LoudnessMaker(block=8), np.concatenate([silence(3), tone(2.0), silence(2), tone(2.0)]))
    found = kinds(seen)
    assert len(seen.onsets) == 2 and len(seen.spoken) >= 8.5 * 25
    assert min(found["where speech begins"]) > 100
    assert max(found["silence"]) == 0 and max(found["speech"]) < 5
    assert found["first frame of a block, silence"] and found["first frame of a block, speech"]


def test_speech_and_silence_have_the_stated_lengths() -> None:
    sound = speech_and_silence(2, 1.0, 0.5)
    assert len(sound) == 3 * RATE
    assert not sound[:RATE].any() and not sound[RATE + RATE // 2 : 2 * RATE + RATE // 2].any()
    loud = [np.abs(sound[start : start + RATE // 2]).max() for start in (RATE, 2 * RATE + RATE // 2)]
    assert min(loud) > 0.01 and sound[RATE] == pytest.approx(0, abs=1e-6)
