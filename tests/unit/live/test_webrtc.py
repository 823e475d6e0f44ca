"""A live session over WebRTC, with a real peer over loopback."""

from __future__ import annotations

import asyncio
import json
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from websockets.asyncio.client import connect

from live_makers import tone
from live_server import Served, served


class Voice(MediaStreamTrack):
    """Half a second of silence, then a tone, at 48 kHz in packets of 20 ms."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._sent = 0
        self._begun: float | None = None

    async def recv(self) -> av.AudioFrame:
        loop = asyncio.get_running_loop()
        self._begun = self._begun or loop.time()
        await asyncio.sleep(max(0.0, self._begun + self._sent * 0.02 - loop.time()))
        speech = tone(0.02, 48000) if self._sent >= 25 else np.zeros(960, np.float32)
        frame = av.AudioFrame.from_ndarray((speech * 32767).astype(np.int16)[None], layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, self._sent * 960, Fraction(1, 48000)
        self._sent += 1
        return frame


async def watch(
    server: Served, seconds: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(time of arrival, brightness) of frames and (time, loudness) of sound at the peer."""
    peer, loop = RTCPeerConnection(RTCConfiguration(iceServers=[])), asyncio.get_running_loop()
    peer.addTransceiver("video", direction="recvonly")
    peer.addTrack(Voice())
    seen: list[tuple[float, float]] = []
    heard: list[tuple[float, float]] = []

    async def read(track: Any) -> None:
        while True:
            frame = await track.recv()
            values = frame.to_ndarray()
            if track.kind == "video":
                values = frame.to_ndarray(format="gray")
            into = seen if track.kind == "video" else heard
            into.append((loop.time(), float(np.abs(values.astype(float)).mean())))

    tasks: list[asyncio.Task[None]] = []
    peer.on("track", lambda track: tasks.append(asyncio.create_task(read(track))))
    await peer.setLocalDescription(await peer.createOffer())
    async with connect(server.address()) as socket:
        offer = {"type": "session.start", "format": "webrtc", "sdp": peer.localDescription.sdp}
        await socket.send(json.dumps(offer))
        while (message := json.loads(await socket.recv()))["type"] != "video.start":
            pass
        await peer.setRemoteDescription(RTCSessionDescription(message["sdp"], "answer"))
        end = loop.time() + seconds
        while loop.time() < end:  # what is not read would hold the close message up
            await socket.recv()
        assert server.stage.sessions == 1
    for task in tasks:
        task.cancel()
    await peer.close()
    return seen, heard


@pytest.mark.slow
def test_voice_goes_in_and_frames_with_sound_come_back() -> None:
    with served(size=64) as server:
        seen, heard = asyncio.run(watch(server, 3.5))
    assert len(seen) > 20 and len(heard) > 50
    bright = next(at for at, value in seen if value > 60)
    loud = next(at for at, value in heard if value > 2000)
    assert abs(bright - loud) < 0.3, "arrival on a busy machine; the stamps of both tracks are one clock"
    assert len({round(value) for _, value in seen}) > 1, "frames change"


def test_stamps_of_both_tracks_are_one_clock() -> None:
    """What the receiver synchronises by."""
    from omniavatar.live.chunk import LiveChunk
    from omniavatar.live.webrtc import RtcOutput

    async def stamps() -> tuple[list[float], list[float]]:
        output = RtcOutput(48000)
        for index in range(3):
            frames, sound = np.zeros((4, 16, 16, 3), np.uint8), np.zeros(7680, np.int16)
            output.add(LiveChunk(frames, sound, index * 0.16, Fraction(25), 48000, False))
            await asyncio.sleep(0.16 if index == 0 else 0.36)  # the third chunk is late
        pictures = [await output.video.recv() for _ in range(12)]
        sounds = [await output.audio.recv() for _ in range(24)]
        return [float(f.pts * f.time_base) for f in pictures], [float(f.pts * f.time_base) for f in sounds]

    pictures, sounds = asyncio.run(stamps())
    assert pictures[0] == sounds[0] == 0
    assert abs(pictures[8] - sounds[16]) < 0.021, "the late chunk is late on both"
    assert pictures[8] > 0.32
