"""The processor in a real Pipecat pipeline, run by Pipecat's own test helper."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from pipecat.frames.frames import (
    ErrorFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.processors.filters.identity_filter import IdentityFilter
from pipecat.tests.utils import SleepFrame, run_test
from pipecat.transports.base_transport import TransportParams
from pipecat_omniavatar import OmniAvatarProcessor

import readme_programs
from live_makers import LoudnessMaker, tone
from omniavatar.live import LiveSession, LiveStage

RATE = 24000
README = Path(__file__).parents[1] / "README.md"


def speech(seconds: float, rate: int = RATE) -> TTSAudioRawFrame:
    return TTSAudioRawFrame((tone(seconds, RATE) * 32767).astype("<i2").tobytes(), rate, 1)


async def sent(*frames: Frame) -> tuple[list[Frame], list[Frame]]:
    """What comes out, down and up, when `frames` go in."""
    async with LiveSession.on(LiveStage(), lambda: LoudnessMaker(size=32), rate=RATE) as session:
        down, up = await run_test(OmniAvatarProcessor(session), frames_to_send=list(frames))
    return list(down), list(up)


def heard(frames: list[Frame]) -> np.ndarray:
    pieces = [np.frombuffer(each.audio, np.int16) for each in frames if isinstance(each, TTSAudioRawFrame)]
    return np.concatenate([np.zeros(0, np.int16), *pieces])


async def test_speech_becomes_pictures_with_their_sound() -> None:
    down, _ = await sent(
        SleepFrame(0.3), *(speech(0.1) for _ in range(4)), TTSStoppedFrame(), SleepFrame(0.2)
    )
    pictures = [each for each in down if isinstance(each, OutputImageRawFrame)]
    assert pictures[0].size == (32, 32) and pictures[0].format == "RGB" and len(pictures[0].image) == 3072
    assert not pictures[0].sync_with_audio, "an idle picture waits for no sound"
    assert abs(np.count_nonzero(heard(down)) / RATE - 0.4) < 0.02, (
        "an end lets the speech be heard to its end"
    )
    for before, after in itertools.pairwise(down):
        if isinstance(after, TTSAudioRawFrame):
            assert isinstance(before, OutputImageRawFrame) and before.sync_with_audio
    loud = [np.frombuffer(each.image, np.uint8).max() for each in pictures]
    assert max(loud) > 100 > loud[0], "the mouth opens"


async def test_an_interruption_drops_what_waits() -> None:
    down, _ = await sent(speech(3.0), SleepFrame(0.6), InterruptionFrame(), SleepFrame(0.5))
    assert 0 < np.count_nonzero(heard(down)) / RATE < 1.2
    at = next(index for index, each in enumerate(down) if isinstance(each, InterruptionFrame))
    assert not heard(down[at:]).any()
    assert any(isinstance(each, OutputImageRawFrame) for each in down[at:]), "the face stays alive"


async def test_bad_sound_is_an_error_of_that_frame() -> None:
    down, up = await sent(speech(0.1, rate=0), speech(0.2), TTSStoppedFrame())
    errors = [each for each in up if isinstance(each, ErrorFrame)]
    assert len(errors) == 1 and "rate: 0" in errors[0].error
    assert heard(down).any()


async def test_a_long_answer_waits_for_room_until_it_is_interrupted() -> None:
    """Two and a half minutes of speech at once; a session takes two."""
    down, up = await sent(
        *(speech(10.0) for _ in range(15)), SleepFrame(1.0), InterruptionFrame(), SleepFrame(0.5)
    )
    assert not [each for each in up if isinstance(each, ErrorFrame)]
    at = next(index for index, each in enumerate(down) if isinstance(each, InterruptionFrame))
    assert heard(down[:at]).any() and not heard(down[at:]).any()


class Output:
    """What the README uses of a transport."""

    def output(self) -> IdentityFilter:
        return IdentityFilter()


async def test_the_program_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme_programs.place(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown: list[Frame] = []

    async def speak(pipeline: Pipeline, params: TransportParams) -> None:
        down, _ = await run_test(pipeline, frames_to_send=[speech(0.3), TTSStoppedFrame(), SleepFrame(1.0)])
        shown.extend(down)
        pictures = [each for each in down if isinstance(each, OutputImageRawFrame)]
        assert {each.size for each in pictures} == {(params.video_out_width, params.video_out_height)}
        assert params.video_out_framerate == 16

    await readme_programs.run(
        README, "await speak(pipeline, params)", tts=IdentityFilter(), transport=Output(), speak=speak
    )
    assert heard(shown).any()
