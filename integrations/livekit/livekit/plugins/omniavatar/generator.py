"""A `VideoGenerator` around a live session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import numpy as np
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, VideoGenerator

from omniavatar.errors import InputError
from omniavatar.live import LiveChunk, LiveSession

_log = logging.getLogger("livekit.plugins.omniavatar")


MOST_WAITING_S = 60.0
"""Seconds of sound that may wait in the session, whose own limit is two minutes."""


class OmniAvatarGenerator(VideoGenerator):
    """Sound of an agent in, frames and their sound out, in play order.

    session: open; its owner closes it.
    """

    def __init__(self, session: LiveSession) -> None:
        self._session = session
        self._ending = self._sounding = False
        self._cleared = 0
        self._refused = False

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Append sound, or mark the end of what the agent says.

        It waits while `MOST_WAITING_S` of sound wait for their frames. What `clear_buffer` overtakes is
        dropped. Sound that cannot be used is logged and left out, because an error would end the runner's
        reading of all later sound.
        """
        if isinstance(frame, AudioSegmentEnd):
            self._ending = True
            self._session.end_speech()
            return
        cleared = self._cleared
        while self._session.stats().waiting > MOST_WAITING_S:
            await asyncio.sleep(0.1)
        if cleared != self._cleared:
            return
        samples = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
        try:
            await self._session.push_audio(samples, frame.sample_rate)
        except InputError as error:
            if not self._refused:
                _log.error("%s", error)
            self._refused = True
            return
        self._refused = False

    def clear_buffer(self) -> None:
        """Drop the sound that was pushed, and the frames of it that were not handed over."""
        self._ending = self._sounding = False
        self._cleared += 1
        self._session.interrupt()

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        """Frames, each followed by its sound while somebody speaks; without end while the session is open."""
        async for chunk in self._session:
            if chunk.delay is not None:
                self._sounding = True
            elif self._ending and self._sounding:
                self._ending = self._sounding = False
                yield AudioSegmentEnd()
            for frame in frames_of(chunk):
                yield frame


def frames_of(chunk: LiveChunk) -> list[rtc.VideoFrame | rtc.AudioFrame]:
    """Pictures of a chunk; each is followed by its sound if some of the chunk's was pushed."""
    frames: list[rtc.VideoFrame | rtc.AudioFrame] = []
    sounds = np.array_split(chunk.audio, len(chunk.frames))
    for picture, sound in zip(chunk.frames, sounds, strict=True):
        height, width, _ = picture.shape
        data = np.ascontiguousarray(picture).tobytes()
        frames.append(rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, data))
        if chunk.delay is not None:
            frames.append(rtc.AudioFrame(sound.tobytes(), chunk.rate, 1, len(sound)))
    return frames
