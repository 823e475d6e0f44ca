"""Live video: an avatar that speaks while someone speaks, for programs and over the network.

from omniavatar.live import LiveSession

async with LiveSession(pipeline, image="face.png", prompt="A woman talks") as session:
    session.push_audio(pcm, 24000)
    async for chunk in session:
        show(chunk.frames, chunk.audio)
"""

from __future__ import annotations

from omniavatar.live.chunk import LiveChunk
from omniavatar.live.session import LiveSession
from omniavatar.live.stage import LiveStage

__all__ = ["LiveChunk", "LiveSession", "LiveStage"]
