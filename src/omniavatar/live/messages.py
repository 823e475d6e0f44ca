"""The messages of a live session over a WebSocket, in the names that vLLM-Omni's realtime video uses.

Text messages are JSON objects with a `type`.
- From the client: `session.start`, `session.audio`, `session.interrupt`, `session.interaction` (another
  prompt), `session.stop`, `session.ping`; and binary messages with int16 sound.
- From the server: `video.start`, `video.chunk_metadata` (a binary message with a piece of fragmented MP4
  follows), `session.interaction.queued`, `session.pong`, `session.note`, `session.done`, `error`.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from omniavatar.errors import InputError
from omniavatar.live.chunk import LiveChunk, LiveStats
from omniavatar.live.sound import LEAST_RATE, MOST_RATE
from omniavatar.text import cut, parse_json

Format = Literal["m4s", "webrtc"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Start(_Message):
    """Begins a session.

    - prompt: default: the server's.
    - format: m4s: fragmented MP4 in binary messages; webrtc: over the peer connection that `sdp` offers.
    - rate: samples a second of the binary messages with sound.
    """

    type: Literal["session.start"]
    prompt: str | None = None
    format: Format = "m4s"
    sdp: str | None = None
    rate: int = Field(16000, ge=LEAST_RATE, le=MOST_RATE)


class Audio(_Message):
    """Sound: `audio` is base64 of int16 mono samples; `last`: no more follows soon."""

    type: Literal["session.audio"]
    audio: str = ""
    rate: int = Field(16000, ge=LEAST_RATE, le=MOST_RATE)
    last: bool = False

    def samples(self) -> bytes:
        """The decoded sound. Raises InputError."""
        try:
            return base64.b64decode(self.audio, validate=True)
        except (binascii.Error, ValueError):
            raise InputError("session.audio: `audio` is not base64; send int16 samples as base64") from None


class Interrupt(_Message):
    """Drops what waits."""

    type: Literal["session.interrupt"]


class Prompt(_Message):
    """The event of an interaction."""

    prompt: str


class Interaction(_Message):
    """Another prompt from the next block on."""

    type: Literal["session.interaction"]
    event: Prompt
    event_id: str | None = None


class StopAsked(_Message):
    """Ends the session; `drain`: after the pushed sound has been shown."""

    type: Literal["session.stop"]
    drain: bool = False


class Ping(_Message):
    """Keeps an idle session."""

    type: Literal["session.ping"]


ClientMessage = Annotated[
    Start | Audio | Interrupt | Interaction | StopAsked | Ping, Field(discriminator="type")
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(ClientMessage)


def parse(text: str) -> Start | Audio | Interrupt | Interaction | StopAsked | Ping:
    """A client's text message. Raises InputError with one line."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise InputError(f"message: is not JSON ({error}); send an object with a `type`") from None
    try:
        message: Start | Audio | Interrupt | Interaction | StopAsked | Ping = _ADAPTER.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "message"
        raise InputError(f"{cut(where, 80)}: {cut(first['msg'], 200)}") from None
    return message


def start_message(size: tuple[int, int], fps: float, rate: int, mime: str | None) -> dict[str, Any]:
    """`video.start`. mime: of the fragmented MP4; None over a peer connection."""
    height, width = size
    values = {"type": "video.start", "width": width, "height": height, "fps": fps, "sample_rate": rate}
    return values if mime is None else {**values, "mime": mime}


def chunk_message(chunk: LiveChunk, stats: LiveStats, size: int | None) -> dict[str, Any]:
    """`video.chunk_metadata`. size: bytes of the binary message that follows; None: none follows."""
    return {
        "type": "video.chunk_metadata",
        "time": round(chunk.time, 4),
        "frames": len(chunk.frames),
        "speaking": chunk.speaking,
        "delay": None if chunk.delay is None else round(chunk.delay, 4),
        "waiting": round(stats.waiting, 3),
        "dropped": stats.dropped,
        "block_s": None if stats.block_s is None else round(stats.block_s, 4),
        "slow": stats.slow,
        "bytes": size,
    }


def done_message(stats: LiveStats | None, reason: str) -> dict[str, Any]:
    """`session.done`."""
    counts = {} if stats is None else {"frames": stats.frames, "dropped": stats.dropped}
    return {"type": "session.done", "reason": reason, **counts}


def slow_note(stats: LiveStats) -> str | None:
    """A sentence for the user if the model is too slow for real time."""
    if not stats.slow or stats.block_s is None:
        return None
    share = stats.period_s / stats.block_s
    return (
        f"this machine makes {share:.2f} s of video a second: sound waits and the picture pauses; "
        "use a faster configuration for a conversation"
    )
