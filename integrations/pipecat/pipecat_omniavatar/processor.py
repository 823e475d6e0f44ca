"""A `FrameProcessor` around a live session."""

from __future__ import annotations

import asyncio

import numpy as np
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
    UserStartedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor

from omniavatar.live import LiveChunk, LiveSession

MOST_WAITING_S = 60.0
"""Seconds of sound that may wait in the session, whose own limit is two minutes."""


class OmniAvatarProcessor(FrameProcessor):
    """Speech in, pictures with their sound out, in play order.

    session: open; its owner closes it. It takes no more sound after an `EndFrame`.
    """

    def __init__(self, session: LiveSession) -> None:
        super().__init__()
        self._session = session
        self._showing: asyncio.Task[None] | None = None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Take sound; pass everything else on."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            samples = np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels)
            try:
                while self._session.stats().waiting > MOST_WAITING_S:  # an interruption ends this task
                    await asyncio.sleep(0.1)
                await self._session.push_audio(samples, frame.sample_rate)
            except Exception as error:  # the pipeline goes on
                await self.push_error(error_msg=f"omniavatar: {error}", exception=error)
            return
        if isinstance(frame, TTSStoppedFrame):
            self._session.end_speech()
        elif isinstance(frame, InterruptionFrame | UserStartedSpeakingFrame):
            self._session.interrupt()
        elif isinstance(frame, EndFrame):
            self._session.end()
            if self._showing is not None:
                await self._showing
        elif isinstance(frame, CancelFrame):
            await self._stop()
        await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame):
            self._showing = self.create_task(self._show())

    async def cleanup(self) -> None:
        """Stop showing frames."""
        await super().cleanup()
        await self._stop()

    async def _stop(self) -> None:
        if self._showing is not None:
            showing, self._showing = self._showing, None
            await self.cancel_task(showing)

    async def _show(self) -> None:
        async for chunk in self._session:
            for frame in frames_of(chunk):
                await self.push_frame(frame)


def frames_of(chunk: LiveChunk) -> list[OutputImageRawFrame | TTSAudioRawFrame]:
    """Pictures of a chunk; each is followed by its sound if some of the chunk's was pushed."""
    frames: list[OutputImageRawFrame | TTSAudioRawFrame] = []
    sounds = np.array_split(chunk.audio, len(chunk.frames))
    for picture, sound in zip(chunk.frames, sounds, strict=True):
        height, width, _ = picture.shape
        image = OutputImageRawFrame(np.ascontiguousarray(picture).tobytes(), (width, height), "RGB")
        image.sync_with_audio = chunk.delay is not None
        frames.append(image)
        if chunk.delay is not None:
            frames.append(TTSAudioRawFrame(sound.tobytes(), chunk.rate, 1))
    return frames
