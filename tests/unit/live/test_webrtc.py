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
from aiortc.mediastreams import MediaStreamError
from websockets.asyncio.client import connect

from live_makers import tone
from live_server import Served, served
from omniavatar.errors import InputError
from omniavatar.live.chunk import LiveChunk
from omniavatar.live.webrtc import PacedTrack, RtcOutput, RtcPeer


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


def test_a_late_chunk_moves_sound_and_picture_though_a_packet_was_begun() -> None:
    """At 16 frames a second a chunk of four frames ends in the middle of a packet of sound."""

    async def stamps() -> tuple[list[float], list[float]]:
        output, frames = RtcOutput(48000), np.zeros((4, 16, 16, 3), np.uint8)
        for index in range(2):
            output.add(LiveChunk(frames, np.zeros(12000, np.int16), index * 0.25, Fraction(16), 48000, False))
            await asyncio.sleep(0.6)
        pictures = [await output.video.recv() for _ in range(8)]
        sounds = [await output.audio.recv() for _ in range(25)]
        return [float(f.pts * f.time_base) for f in pictures], [float(f.pts * f.time_base) for f in sounds]

    pictures, sounds = asyncio.run(stamps())
    assert pictures[4] > 0.5
    assert abs(pictures[4] - (sounds[12] + 0.01)) < 0.001, "half a packet of the first chunk, then the second"


def test_a_track_that_nobody_reads_keeps_a_second() -> None:
    """A peer whose encoder is too slow gets frames dropped."""

    async def fill() -> tuple[PacedTrack, int]:
        track, now = PacedTrack("video"), asyncio.get_running_loop().time()
        picture = av.VideoFrame(16, 16, "rgb24")
        for index in range(1000):
            track.add(now - 100 + index / 10, picture)
        kept = 0
        while kept + track.dropped < 1000:
            await track.recv()
            kept += 1
        return track, kept

    track, kept = asyncio.run(fill())
    assert track.dropped > 900 and 5 <= kept <= 1000 - track.dropped


def test_a_peers_sound_that_is_refused_for_a_while_is_heard_again() -> None:
    """A slow model refuses sound while two minutes of it wait."""
    errors: list[InputError] = []
    pushed: list[int] = []

    class Session:
        rate = 48000

        def push_audio(self, pcm: np.ndarray, rate: int) -> None:
            pushed.append(len(pcm))
            if 2 < len(pushed) < 6:
                raise InputError("sound: 121 s would wait to be shown")

    class Track:
        kind = "audio"

        async def recv(self) -> av.AudioFrame:
            if len(pushed) == 9:
                raise MediaStreamError
            frame = av.AudioFrame("s16", "stereo", 960)
            frame.sample_rate = 48000
            return frame

    async def listen() -> None:
        session: Any = Session()
        await RtcPeer(session, errors.append).listen(Track())

    asyncio.run(listen())
    assert pushed == [960] * 9 and len(errors) == 1
