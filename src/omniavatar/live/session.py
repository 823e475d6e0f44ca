"""A live session for programs: sound in, frames with their sound out, at the pace of a clock.

    async with LiveSession(pipeline, image="face.png", prompt="A woman talks") as session:
        await session.push_audio(pcm, 24000)
        async for chunk in session:
            ...

The same class works without asyncio: `with`, `for`, and `push_audio` without `await`. A session makes at most
one block before it is shown. Without sound it shows a silent, living face. A reader that is too slow loses
frames (`stats().dropped`), never the clock. All sessions of a pipeline take turns in one thread
(`live.stage`); the pipeline makes nothing else meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from omniavatar.config.values import prompt_text
from omniavatar.errors import InputError
from omniavatar.live.chunk import LiveChunk, LiveStats
from omniavatar.live.maker import BlockMaker
from omniavatar.live.player import Player
from omniavatar.live.sound import check_rate
from omniavatar.live.stage import LiveStage
from omniavatar.live.state import load_state, restore, save_state

if TYPE_CHECKING:
    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.types import ImageInput

RATE = 48000
"""Samples a second of the sound that leaves, if nothing else is given."""
MOST_PROMPT_CHARACTERS = 4000
T = TypeVar("T")


class CallResult(Generic[T]):
    """What a call gives: `await` it, or call `result`, or leave it."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def __await__(self) -> Generator[Any, None, T]:
        if self._future.done():
            return self._future.result()
        return (yield from asyncio.wrap_future(self._future).__await__())

    def result(self, timeout: float | None = None) -> T:
        """Wait for it, at most `timeout` seconds. Raises its error, or TimeoutError."""
        return self._future.result(timeout)


class LiveSession:
    """One avatar that speaks what is pushed.

    - pipeline: its models are shared by all its sessions.
    - image, prompt: as in an `AvatarRequest`; FlashHead and LeapTalk take no prompt.
    - seed: of the noise; default: the configuration's.
    - rate: samples a second of `LiveChunk.audio`.
    - state: a file of `save`; the session continues it.

    Opening it raises InputError, ConfigError, CheckpointError, ResumeError, and ResourceError if the machine
    has no room for another session.
    """

    def __init__(
        self,
        pipeline: AvatarPipeline,
        *,
        image: ImageInput,
        prompt: str = "",
        seed: int | None = None,
        rate: int = RATE,
        state: str | Path | None = None,
    ) -> None:
        from omniavatar.live.makers import maker_of, stage_of

        text = check_prompt(prompt) if pipeline.config.family.text else ""
        self._begin(stage_of(pipeline), lambda: maker_of(pipeline, image, text, seed), rate, state)

    @classmethod
    def on(
        cls,
        stage: LiveStage,
        build: Callable[[], BlockMaker],
        rate: int = RATE,
        state: str | Path | None = None,
    ) -> Self:
        """A session of a stage, with the maker that `build` returns."""
        session = cls.__new__(cls)
        session._begin(stage, build, rate, state)
        return session

    def _begin(
        self, stage: LiveStage, build: Callable[[], BlockMaker], rate: int, state: str | Path | None
    ) -> None:
        self._stage, self._build, self._rate = stage, build, check_rate(rate)
        self._state = None if state is None else Path(state)
        self._started = False
        self._opened: Player | None = None
        self._changed: asyncio.Event | None = None

    # Sound and prompt

    def push_audio(self, pcm: Any, rate: int) -> CallResult[None]:
        """Append sound of any length; it never waits for frames.

        - pcm: (n,) or (n, channels), int16 or float in [-1, 1]; or bytes of mono int16 samples.
        - rate: samples a second.

        Raises InputError if it cannot be used; the session goes on.
        """
        self._player.push(pcm, rate)
        return done()

    def end_speech(self) -> None:
        """No more sound follows soon, so nothing waits for it."""
        self._player.end_speech()

    def interrupt(self) -> None:
        """Drop the sound that was pushed and the frames of it that were not handed over."""
        self._player.interrupt()

    def set_prompt(self, prompt: str) -> None:
        """Use another prompt from the next block on. Raises InputError."""
        self._player.set_prompt(check_prompt(prompt))

    def end(self) -> None:
        """Take no more sound; the iteration ends when the pushed sound has been handed over."""
        self._player.end()

    # State

    def stats(self) -> LiveStats:
        """Counts and measured times."""
        return self._player.stats()

    def save(self, path: str | Path) -> CallResult[None]:
        """Write what a later session needs to continue, between two blocks. Raises OutputError."""
        player, target = self._player, Path(path)
        return CallResult(self._stage.call(lambda: save_state(player, target)))

    @property
    def fps(self) -> float:
        """Frames a second."""
        return float(self._player.maker.fps)

    @property
    def exact_fps(self) -> Fraction:
        """Frames a second as a fraction."""
        return self._player.maker.fps

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the frames."""
        return self._player.maker.size

    @property
    def rate(self) -> int:
        """Samples a second of the sound that leaves."""
        return self._rate

    # Opening and closing

    def _open(self) -> Future[Player]:
        if self._started:
            raise InputError("session: it was started already; make another LiveSession")
        self._started = True
        state = None if self._state is None else load_state(self._state)
        if state is None:
            return self._stage.open(self._build, self._rate)
        return self._stage.open(self._build, self._rate, lambda player: restore(player, state))

    @property
    def _player(self) -> Player:
        if self._opened is None:
            raise InputError("session: it is not open; use it in a `with` or `async with` block")
        return self._opened

    def close(self) -> CallResult[None]:
        """End the session; what it has is freed when the result has come."""
        return done() if self._opened is None else CallResult(self._stage.leave(self._opened))

    def __enter__(self) -> Self:
        self._opened = self._open().result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close().result()

    async def __aenter__(self) -> Self:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        future = self._open()
        try:
            self._opened = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._leave_opened)
            raise
        self._changed = changed

        def wake() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        self._opened.listen(wake)
        return self

    def _leave_opened(self, future: Future[Player]) -> None:
        """Free a session that nobody waited for."""
        if not future.cancelled() and future.exception() is None:
            self._stage.leave(future.result())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Chunks

    def __iter__(self) -> Iterator[LiveChunk]:
        """Chunks at their time, until the session ends. Raises its error."""
        player = self._player
        while True:
            try:
                chunk = player.next()
            except EOFError:
                return
            if chunk is not None:
                yield chunk

    def next(self, seconds: float) -> LiveChunk | None:
        """The next chunk, or None if none comes within `seconds`. Raises EOFError at the end."""
        return self._player.next(seconds)

    def __aiter__(self) -> AsyncIterator[LiveChunk]:
        """As `__iter__`, without blocking the event loop."""
        return self

    async def __anext__(self) -> LiveChunk:
        player, changed = self._player, self._changed
        if changed is None:
            raise InputError("session: it was opened with `with`; read it with `for`")
        while True:
            changed.clear()
            try:
                found = player.take()
            except EOFError:
                raise StopAsyncIteration from None
            if isinstance(found, LiveChunk):
                return found
            try:
                await asyncio.wait_for(changed.wait(), found)
            except TimeoutError:
                continue


def check_prompt(prompt: Any) -> str:
    """`prompt`, if a session can use it. Raises InputError."""
    try:
        text = prompt_text(prompt)
    except ValueError as error:
        raise InputError(f"prompt: {error}") from None
    if not text.strip():
        raise InputError("prompt: is empty; describe the person and the scene in a sentence")
    if len(text) > MOST_PROMPT_CHARACTERS:
        raise InputError(
            f"prompt: has {len(text):,} characters, the most is {MOST_PROMPT_CHARACTERS:,}; shorten it"
        )
    return text


def done() -> CallResult[None]:
    """The result of a call that is finished."""
    future: Future[None] = Future()
    future.set_result(None)
    return CallResult(future)
