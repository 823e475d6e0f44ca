"""The generator in LiveKit's own AvatarRunner, with a room that needs no server."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarOptions, AvatarRunner, QueueAudioOutput
from livekit.plugins.omniavatar import OmniAvatarGenerator

import readme_programs
from live_makers import LoudnessMaker, tone
from omniavatar.live import LiveSession, LiveStage

RATE = 24000
README = Path(__file__).parents[1] / "README.md"


def new_session() -> LiveSession:
    return LiveSession.on(LiveStage(), lambda: LoudnessMaker(size=32), rate=RATE)


def sound(seconds: float) -> rtc.AudioFrame:
    samples = (tone(seconds, RATE) * 32767).astype(np.int16)
    return rtc.AudioFrame(samples.tobytes(), RATE, 1, len(samples))


async def read(generator: OmniAvatarGenerator, seconds: float) -> list[Any]:
    """What it yields in that many seconds of video."""
    frames: list[Any] = []
    async for frame in generator:
        frames.append(frame)
        if sum(isinstance(each, rtc.VideoFrame) for each in frames) >= seconds * 25:
            return frames
    return frames


def heard(frames: list[Any]) -> np.ndarray:
    pieces = [np.frombuffer(each.data, np.int16) for each in frames if isinstance(each, rtc.AudioFrame)]
    return np.concatenate([np.zeros(0, np.int16), *pieces])


async def test_pictures_and_sound_come_in_play_order_and_the_end_is_marked() -> None:
    async with new_session() as session:
        generator = OmniAvatarGenerator(session)
        idle = await read(generator, 0.3)
        assert all(isinstance(each, rtc.VideoFrame) for each in idle), "an idle face without sound"
        for _ in range(4):
            await generator.push_audio(sound(0.1))
        await generator.push_audio(AudioSegmentEnd())
        frames = await read(generator, 1.5)
    kinds = [type(each) for each in frames]
    assert kinds.count(AudioSegmentEnd) == 1
    last_sound = max(index for index, kind in enumerate(kinds) if kind is rtc.AudioFrame)
    assert kinds.index(AudioSegmentEnd) > last_sound
    assert abs(np.count_nonzero(heard(frames)) / RATE - 0.4) < 0.02
    for before, after in itertools.pairwise(kinds):
        assert not (before is after is rtc.AudioFrame), "each picture comes with its sound"


async def test_clear_buffer_stops_the_sound() -> None:
    async with new_session() as session:
        generator = OmniAvatarGenerator(session)
        await generator.push_audio(sound(3.0))
        await read(generator, 0.5)
        generator.clear_buffer()
        assert not heard(await read(generator, 0.5)).any()
        await generator.push_audio(sound(0.2))
        assert heard(await read(generator, 1.0)).any()


class Participant:
    """Takes the tracks that the runner publishes."""

    def __init__(self) -> None:
        self.tracks: list[Any] = []

    async def publish_track(self, track: Any, options: Any) -> Any:
        self.tracks.append(track)
        return self

    async def wait_for_subscription(self) -> None:
        return None


class Room:
    """What AvatarRunner uses of a room."""

    def __init__(self) -> None:
        self.local_participant = Participant()

    def isconnected(self) -> bool:
        return True

    def on(self, event: str, callback: Any) -> None: ...

    def off(self, event: str, callback: Any) -> None: ...


async def test_in_an_avatar_runner() -> None:
    room, finished = Room(), asyncio.Event()
    async with new_session() as session:
        output = QueueAudioOutput(sample_rate=RATE)
        output.on("playback_finished", lambda event: finished.set())
        height, width = session.size
        options = AvatarOptions(width, height, session.fps, RATE, 1)
        runner = AvatarRunner(
            room,  # type: ignore[arg-type]
            audio_recv=output,
            video_gen=OmniAvatarGenerator(session),
            options=options,
        )
        await runner.start()
        await output.capture_frame(sound(0.3))
        output.flush()
        await asyncio.wait_for(finished.wait(), 10)
        await runner.aclose()
    assert {type(track) for track in room.local_participant.tracks} == {
        rtc.LocalAudioTrack,
        rtc.LocalVideoTrack,
    }


async def test_bad_sound_is_one_error_and_later_sound_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    """An exception would end the runner's reading task."""
    async with new_session() as session:
        generator = OmniAvatarGenerator(session)
        for _ in range(3):
            await generator.push_audio(rtc.AudioFrame(b"\0\0", 0, 1, 1))
        await generator.push_audio(sound(0.2))
        assert heard(await read(generator, 0.8)).any()
    errors = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert len(errors) == 1 and "rate: 0" in errors[0]


async def test_a_long_answer_waits_for_room_until_it_is_cleared() -> None:
    """An agent sends minutes of speech at once; a session takes two."""
    async with new_session() as session:
        generator = OmniAvatarGenerator(session)

        async def agent() -> None:
            for _ in range(15):
                await generator.push_audio(sound(10.0))

        speaking = asyncio.create_task(agent())
        await asyncio.sleep(0.5)
        assert not speaking.done() and session.stats().waiting > 60
        speaking.cancel()
        late = asyncio.create_task(generator.push_audio(sound(1.0)))
        await asyncio.sleep(0.2)
        assert not late.done()
        generator.clear_buffer()
        await asyncio.wait_for(late, 5)
        assert session.stats().waiting == 0, "what waited to be pushed was cleared too"


async def test_the_program_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent speaks through it to the room's end of a sound."""
    readme_programs.place(tmp_path)
    monkeypatch.chdir(tmp_path)
    room, agent_session = Room(), SimpleNamespace(output=SimpleNamespace(audio=None))

    async def speak(runner: AvatarRunner) -> None:
        finished, output = asyncio.Event(), agent_session.output.audio
        output.on("playback_finished", lambda event: finished.set())
        await output.capture_frame(sound(0.3))
        output.flush()
        await asyncio.wait_for(finished.wait(), 60)
        await runner.aclose()

    await readme_programs.run(
        README, "await speak(runner)", room=room, agent_session=agent_session, speak=speak
    )
    assert len(room.local_participant.tracks) == 2
