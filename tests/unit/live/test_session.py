"""Live sessions with a small maker: pace, sync, interruption, slow readers, errors, sharing, state."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from live_makers import LoudnessMaker, impulse, tone
from omniavatar.errors import InputError, NumbersError, ResourceError, ResumeError
from omniavatar.live import LiveChunk, LiveSession, LiveStage
from omniavatar.live.chunk import LiveStats


def opened(maker: LoudnessMaker, stage: LiveStage | None = None, **options: object) -> LiveSession:
    return LiveSession.on(stage or LiveStage(), lambda: maker, **options)  # type: ignore[arg-type]


def taken(session: LiveSession, seconds: float) -> list[LiveChunk]:
    """Chunks of the next `seconds` on the session's clock."""
    chunks, end = [], None
    for chunk in session:
        end = chunk.time + seconds if end is None else end
        chunks.append(chunk)
        if chunk.time + chunk.seconds >= end - 1e-6:
            return chunks
    return chunks


def sound_of(chunks: list[LiveChunk]) -> np.ndarray:
    return np.concatenate([chunk.audio for chunk in chunks]) / 32768


def brightness(chunks: list[LiveChunk]) -> np.ndarray:
    return np.concatenate([chunk.frames[:, 0, 0, 0] for chunk in chunks])


def test_without_sound_the_face_goes_on_at_the_pace_of_the_clock() -> None:
    with opened(LoudnessMaker()) as session:
        begun = time.monotonic()
        chunks = taken(session, 0.8)
        passed = time.monotonic() - begun
    assert sum(len(chunk.frames) for chunk in chunks) == 20
    assert 0.6 < passed < 1.2
    assert not any(chunk.speaking for chunk in chunks)
    assert not sound_of(chunks).any() and all(chunk.delay is None for chunk in chunks)
    times = [chunk.time for chunk in chunks]
    assert np.allclose(np.diff(times), [chunk.seconds for chunk in chunks[:-1]]), "no gap, no overlap"


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_an_impulse_and_the_mouth_are_at_one_time(rate: int) -> None:
    """The click's place in the sound against the first bright frame, at most one frame (40 ms) apart."""
    with opened(LoudnessMaker(), rate=24000) as session:
        session.push_audio(impulse(0.6, 0.31, rate), rate)
        session.end()
        chunks = list(session)
    heard = int(np.abs(sound_of(chunks)).argmax()) / 24000
    seen = int(brightness(chunks).argmax()) / 25
    assert brightness(chunks).max() > 100
    assert 0 <= heard - seen <= 0.040


def test_sound_in_real_time_and_in_any_pieces_has_no_gap() -> None:
    """What a microphone sends for a second comes out whole, whatever the size of its pieces."""
    speech, pieces = tone(1.0), np.random.default_rng(0)
    with opened(LoudnessMaker(), rate=16000) as session:
        taken(session, 0.3)

        def microphone() -> None:
            sent, begun = 0, time.monotonic()
            while sent < len(speech):
                count = int(pieces.integers(1, 900))
                session.push_audio(speech[sent : sent + count], 16000)
                sent += count
                time.sleep(max(0.0, begun + sent / 16000 - time.monotonic()))
            session.end()

        thread = threading.Thread(target=microphone)
        thread.start()
        chunks = list(session)
        thread.join()
    heard = sound_of(chunks)
    first = int(np.flatnonzero(heard)[0])
    assert np.abs(heard[first : first + len(speech) - 1] - speech[1:]).max() < 1e-3
    delays = [chunk.delay for chunk in chunks if chunk.delay is not None]
    assert max(delays) < 1.0


def test_no_block_is_made_before_the_one_before_it_is_shown() -> None:
    maker = LoudnessMaker()
    with opened(maker) as session:
        session.push_audio(tone(5.0), 16000)
        chunks = taken(session, 0.8)
        stats = session.stats()
    assert sum(len(chunk.frames) for chunk in chunks) >= 20
    assert stats.blocks * 4 - 20 <= 2 * 4, "at most one block is ready while one is shown"
    assert stats.waiting > 3


def test_interrupt_drops_what_waits_and_listens_again() -> None:
    with opened(LoudnessMaker(), rate=16000) as session:
        session.push_audio(tone(3.0), 16000)
        before = taken(session, 0.4)
        session.interrupt()
        assert session.stats().waiting == 0
        after = taken(session, 0.4)
        session.push_audio(tone(0.3), 16000)
        answer = taken(session, 0.8)
    assert any(chunk.speaking for chunk in before)
    assert not any(chunk.speaking for chunk in after), "not one frame of the dropped sound"
    assert any(chunk.speaking for chunk in answer)
    assert after[0].time == pytest.approx(before[-1].time + before[-1].seconds), "the clock has no gap"
    speaking = next(chunk.time for chunk in answer if chunk.speaking)
    assert speaking - (after[-1].time + after[-1].seconds) <= 2 * 0.16


def test_an_interrupted_block_stops_at_its_next_step() -> None:
    maker = LoudnessMaker(block=10, seconds=0.3, steps=10)
    with opened(maker) as session:
        session.push_audio(tone(5.0), 16000)
        taken(session, 0.4)
        time.sleep(0.25)  # the next block is being made
        session.interrupt()
        assert not any(chunk.speaking for chunk in taken(session, 0.4))


def test_a_slow_reader_loses_frames_and_they_are_counted() -> None:
    with opened(LoudnessMaker()) as session:
        first = next(iter(session))
        time.sleep(2.0)
        chunk = next(iter(session))
        stats = session.stats()
    assert stats.dropped > 10
    assert chunk.time - first.time > 0.5, "the clock went on"
    assert stats.frames - stats.dropped < 45, "nothing piles up"


def test_a_prompt_acts_at_the_next_block() -> None:
    maker = LoudnessMaker()
    with opened(maker) as session:
        taken(session, 0.2)
        session.set_prompt("A man laughs")
        taken(session, 0.4)
        assert maker.prompts == ["A man laughs"]


BAD_SOUND = {
    "rate 0": (np.zeros(10, np.int16), 0, "rate: 0 samples"),
    "rate as text": (np.zeros(10, np.int16), "16000", "rate: must be a whole number"),
    "NaN": (np.array([0.0, np.nan]), 16000, "not finite"),
    "text": ("hello", 16000, "is text"),
    "10 MB": (bytes(10_000_000), 16000, "the most is"),
    "odd bytes": (b"\0\0\0", 16000, "whole 16-bit samples"),
    "int32": (np.zeros(10, np.int32), 16000, "int32"),
    "a picture": (np.zeros((3, 4, 5), np.float32), 16000, "shape"),
    "a list": ([0.0], 16000, "is a list"),
    "minutes": (np.zeros(130 * 4000, np.int16), 4000, "would wait"),
}


@pytest.mark.parametrize("name", BAD_SOUND)
def test_bad_sound_is_one_error_and_the_session_goes_on(name: str) -> None:
    pcm, rate, text = BAD_SOUND[name]
    with opened(LoudnessMaker()) as session:
        with pytest.raises(InputError, match=text) as raised:
            session.push_audio(pcm, rate)  # type: ignore[arg-type]
        assert "\n" not in str(raised.value)
        session.push_audio(tone(0.2), 16000)
        assert any(chunk.speaking for chunk in taken(session, 0.6))


@pytest.mark.parametrize("prompt", ["", "word " * 10_000, 5, "\ud800"])
def test_bad_prompts(prompt: object) -> None:
    with opened(LoudnessMaker()) as session:
        with pytest.raises(InputError, match=r"^prompt: "):
            session.set_prompt(prompt)  # type: ignore[arg-type]
        assert taken(session, 0.2)


def test_wrong_use() -> None:
    session = opened(LoudnessMaker())
    with pytest.raises(InputError, match="not open"):
        session.push_audio(tone(0.1), 16000)
    with session:
        with pytest.raises(InputError, match="started already"):
            session.__enter__()
        session.end()
        with pytest.raises(InputError, match="has ended"):
            session.push_audio(tone(0.1), 16000)
    with pytest.raises(InputError, match="has ended"):
        session.push_audio(tone(0.1), 16000)


def test_an_error_of_one_session_leaves_the_others() -> None:
    stage, broken = LiveStage(), LoudnessMaker()
    with opened(broken, stage) as one, opened(LoudnessMaker(), stage) as other:
        taken(one, 0.2)
        broken.fails = NumbersError("block 3: has no finite numbers")
        with pytest.raises(NumbersError, match="block 3"):
            list(one)
        with pytest.raises(NumbersError):
            one.push_audio(tone(0.1), 16000)
        assert len(taken(other, 0.4)) > 2


def test_a_refused_prompt_ends_no_session() -> None:
    """The maker's refusal, which comes later, is the session's error."""
    with opened(LoudnessMaker()) as session:
        session.set_prompt("refuse this")
        with pytest.raises(InputError, match="is refused"):
            list(session)


def test_closing_frees_within_a_second() -> None:
    stage, maker = LiveStage(), LoudnessMaker(block=50, seconds=3.0, steps=30)
    with opened(maker, stage) as session:
        session.push_audio(tone(2.0), 16000)
        time.sleep(0.2)
        begun = time.monotonic()
    assert time.monotonic() - begun < 1.0
    assert maker.closed and stage.sessions == 0
    assert list(session) == []
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "omniavatar-live"]


def test_two_sessions_take_turns_and_a_third_is_refused() -> None:
    stage = LiveStage()
    makers = [LoudnessMaker(block=8, seconds=0.12, steps=1) for _ in range(3)]
    with opened(makers[0], stage) as one, opened(makers[1], stage) as two:
        begun = time.monotonic()
        with pytest.raises(ResourceError, match=r"live: the open sessions take \d+% .* close one"):
            opened(makers[2], stage).__enter__()
        assert makers[2].closed and stage.sessions == 2
        assert len(taken(one, 0.8)) > 2 and len(taken(two, 0.8)) > 2
        assert time.monotonic() - begun < 6
    order = sorted([(at, 0) for at in makers[0].made] + [(at, 1) for at in makers[1].made])
    both = [who for _, who in order][-8:]
    assert both.count(0) == pytest.approx(4, abs=1), "neither waits for the other's second block"


def test_memory_is_a_budget_too() -> None:
    free = iter([10e9, 10e9, 4e9, 4e9])
    stage = LiveStage(free_memory=lambda: int(next(free)))
    with opened(LoudnessMaker(), stage), pytest.raises(ResourceError, match=r"GPU memory free .* close one"):
        opened(LoudnessMaker(), stage).__enter__()


def test_a_model_that_is_too_slow_buffers() -> None:
    """Everything pushed comes out, late; without sound the face goes on."""
    maker = LoudnessMaker(seconds=0.3)
    with opened(maker, rate=16000) as session:
        taken(session, 0.3)
        assert session.stats().slow
        assert len(taken(session, 0.8)) >= 4, "a silent face lives on, though with pauses"
        session.push_audio(tone(0.5), 16000)
        session.end()
        heard = sound_of(list(session))
        assert np.abs(heard).max() > 0.4 and np.count_nonzero(heard) >= 0.49 * 16000
        assert session.stats().stalls > 0


@pytest.mark.slow
def test_sound_does_not_wait_for_a_slow_block_of_silence() -> None:
    """A block of silence in the making is given up at its next step when sound comes."""
    stage, free = LiveStage(), threading.Event()
    maker = LoudnessMaker(block=10, seconds=1.0, steps=50)
    with opened(maker, stage) as session:
        while session.stats().block_s is None:
            session.next(0.05)
        assert session.stats().slow
        time.sleep(0.1)  # the next block, of silence, is being made
        blocks = session.stats().blocks
        session.push_audio(tone(1.0), 16000)
        stage.call(free.set)
        assert free.wait(0.5), "the stage is free before the block would have been made"
        assert session.stats().blocks == blocks
        assert any(chunk.speaking for chunk in taken(session, 0.8))


def test_a_saved_session_continues_with_the_same_frames(tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    speech = tone(1.0)
    with opened(LoudnessMaker(), rate=16000) as session:
        session.push_audio(speech[:4000], 16000)
        taken(session, 0.32)
        session.save(path).result()
        blocks = session.stats().frames
    with opened(LoudnessMaker(), rate=16000, state=path) as resumed:
        chunks = taken(resumed, 0.16)
        assert resumed.stats().frames >= blocks
    assert chunks[0].time >= 0.32 - 1e-6
    with pytest.raises(ResumeError, match="saved with sound at 16000"):
        opened(LoudnessMaker(), rate=8000, state=path).__enter__()
    path.write_bytes(b"nothing")
    with pytest.raises(ResumeError, match="is no saved live session"):
        opened(LoudnessMaker(), rate=16000, state=path).__enter__()


def test_a_session_without_a_further_block_keeps_no_other_out() -> None:
    """A new session waits until the others are measured, which those that have ended never are."""
    stage = LiveStage()
    with opened(LoudnessMaker(), stage) as ended:
        ended.end()
        list(ended)
        stage.leave(stage.open(LoudnessMaker, 16000).result(5)).result(5)
        assert stage.sessions == 1


def test_the_asynchronous_form() -> None:
    async def talk() -> tuple[list[LiveChunk], float, LiveStats]:
        chunks, ticks = [], 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        async with opened(LoudnessMaker()) as session:
            begun = time.monotonic()
            await session.push_audio(tone(0.4), 16000)
            assert time.monotonic() - begun < 0.05
            session.end()
            async for chunk in session:
                chunks.append(chunk)
            stats = session.stats()
        ticking.cancel()
        return chunks, ticks, stats

    chunks, ticks, stats = asyncio.run(talk())
    assert any(chunk.speaking for chunk in chunks)
    assert ticks > 15, "the event loop was free"
    assert stats.dropped == 0


def test_a_cancelled_opening_leaves_no_session() -> None:
    stage = LiveStage()

    def build() -> LoudnessMaker:
        time.sleep(0.3)
        return LoudnessMaker()

    async def give_up() -> None:
        task = asyncio.create_task(LiveSession.on(stage, build).__aenter__())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.5)

    asyncio.run(give_up())
    assert stage.sessions == 0
