"""A live session over WebRTC (aiortc): two tracks with one clock leave, a microphone comes.

Both tracks carry the session's time, so the receiver plays them together. A late chunk moves the clock of
both. Before the connection stands, the session drops its frames. No STUN server is used: peers connect over
addresses that the two machines have themselves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from math import inf
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from omniavatar.errors import InputError
from omniavatar.live.session import LiveSession
from omniavatar.live.timeline import LATE_S

if TYPE_CHECKING:
    from omniavatar.live.chunk import LiveChunk

_PACKET_S = 0.02
_VIDEO_CLOCK = 90_000
_AHEAD_S = 0.04
"""How long after a chunk's arrival its first frame leaves: room for an event loop that is late."""


class PacedTrack(MediaStreamTrack):
    """A track whose frames leave at the times they were given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._frames: deque[tuple[float, av.VideoFrame | av.AudioFrame]] = deque()
        self._changed = asyncio.Event()
        self.dropped = 0

    def add(self, when: float, frame: av.VideoFrame | av.AudioFrame) -> None:
        """Let `frame` leave at `when` of the event loop's clock. Much too late ones are dropped."""
        oldest = asyncio.get_running_loop().time() - LATE_S
        while self._frames and self._frames[0][0] < oldest:
            self._frames.popleft()
            self.dropped += 1
        self._frames.append((when, frame))
        self._changed.set()

    async def recv(self) -> av.VideoFrame | av.AudioFrame:
        """The next frame at its time, for aiortc."""
        while not self._frames:
            self._changed.clear()
            await self._changed.wait()
        when, frame = self._frames.popleft()
        await asyncio.sleep(max(0.0, when - asyncio.get_running_loop().time()))
        return frame


class RtcOutput:
    """Puts chunks on a video and an audio track."""

    def __init__(self, rate: int) -> None:
        self.video, self.audio = PacedTrack("video"), PacedTrack("audio")
        self._rate, self._packet = rate, round(rate * _PACKET_S)
        self._origin: float | None = None
        self._first = 0.0
        self._sound = np.zeros(0, np.int16)
        self._sound_time = -inf

    def add(self, chunk: LiveChunk) -> None:
        """Queue the frames and the sound of a chunk that has come at its time."""
        now = asyncio.get_running_loop().time()
        if self._origin is None:
            self._origin = self._first = now + _AHEAD_S - chunk.time
        self._origin = max(self._origin, now - chunk.time)
        for index, rgb in enumerate(chunk.frames):
            at = self._origin + chunk.time + index / float(chunk.fps)
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            picture.pts = round((at - self._first) * _VIDEO_CLOCK)
            picture.time_base = Fraction(1, _VIDEO_CLOCK)
            self.video.add(at, picture)
        begins = self._origin + chunk.time - len(self._sound) / self._rate
        if abs(begins - self._sound_time) > 1e-3:  # the clock was moved
            self._sound_time = begins
        self._sound = np.concatenate([self._sound, chunk.audio])
        while len(self._sound) >= self._packet:
            piece, self._sound = self._sound[: self._packet], self._sound[self._packet :]
            frame = av.AudioFrame.from_ndarray(piece[None], format="s16", layout="mono")
            frame.sample_rate, frame.time_base = self._rate, Fraction(1, self._rate)
            frame.pts = round((self._sound_time - self._first) * self._rate)
            self.audio.add(self._sound_time, frame)
            self._sound_time += _PACKET_S


class RtcPeer:
    """The server's side of one peer connection.

    - on_error: called with an error of the peer's sound.
    """

    def __init__(self, session: LiveSession, on_error: Callable[[InputError], object]) -> None:
        self._session, self._on_error = session, on_error
        self.output = RtcOutput(session.rate)
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._state = asyncio.Event()
        self._listening: list[asyncio.Task[None]] = []

    async def answer(self, sdp: str) -> str:
        """The answer to an offer; the connection is made in the background. Raises InputError."""
        connection = self._connection
        connection.on("connectionstatechange", lambda: self._state.set())
        connection.on("track", self._on_track)
        try:
            await connection.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
            connection.addTrack(self.output.video)
            connection.addTrack(self.output.audio)
            await connection.setLocalDescription(await connection.createAnswer())
        except Exception as error:
            raise InputError(f"sdp: is not an offer that can be answered ({error})") from None
        return connection.localDescription.sdp

    def _on_track(self, track: Any) -> None:
        if track.kind == "audio":
            self._listening.append(asyncio.create_task(self.listen(track)))

    async def listen(self, track: Any) -> None:
        """Push the peer's sound until it ends. Refused pieces in a row are one error."""
        refused = False
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            channels = len(frame.layout.channels)
            try:
                self._session.push_audio(frame.to_ndarray().reshape(-1, channels), frame.sample_rate)
                refused = False
            except InputError as error:
                if not refused:
                    self._on_error(error)
                refused = True

    @property
    def connected(self) -> bool:
        """Whether frames can leave."""
        return self._connection.connectionState == "connected"

    async def gone(self) -> None:
        """Wait until the connection has ended."""
        while self._connection.connectionState not in ("failed", "closed"):
            self._state.clear()
            await self._state.wait()

    async def close(self) -> None:
        """End the connection."""
        for task in self._listening:
            task.cancel()
        await self._connection.close()
