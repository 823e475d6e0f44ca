"""One WebSocket connection of a live server: its messages, its session, its frames.

A wrong message is answered by `error`, and the session goes on. The end of the connection ends the session.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from omniavatar.errors import InputError, OmniAvatarError, for_clients
from omniavatar.live.limits import ServerLimits
from omniavatar.live.messages import (
    Audio,
    Interaction,
    Interrupt,
    Ping,
    Start,
    StopAsked,
    chunk_message,
    done_message,
    parse,
    slow_note,
    start_message,
)
from omniavatar.live.session import LiveSession, check_prompt
from omniavatar.media.streamed import StreamWriter
from omniavatar.text import json_text, one_line

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

    from omniavatar.live.webrtc import RtcPeer

Result = TypeVar("Result")
EARLY_BYTES, EARLY_MESSAGE = 16 * 2**20, 512
"""What is kept of a client that speaks while its session opens: two minutes at 48 kHz in pieces of 20 ms. The
second number is added to the bytes of each message."""
_log = logging.getLogger("omniavatar.live")

_TOO_EARLY = (
    f"session: it is not open yet, and {EARLY_BYTES // 2**20} MB wait for it; what you send is dropped until "
    "video.start comes"
)

MakeSession = Callable[[str | None], LiveSession]
"""A new session for a prompt, or for the server's own (None)."""


async def in_thread(work: Callable[..., Result], *arguments: object) -> Result:
    """What `work` returns, from a thread. A cancelled task ends after the thread.

    So its caller may free what the thread uses: an encoder that is closed while it works ends the process.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({running})
        running.exception()  # of a result that nobody waits for
        raise


class EarlyMessages:
    """What a client sends while its session opens, in order.

    Of what comes after EARLY_BYTES, only the client's end is kept: `session.stop`, or that it has left.
    """

    def __init__(self) -> None:
        self._kept: deque[dict[str, Any]] = deque()
        self._bytes = 0
        self._stops = False

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, received: dict[str, Any]) -> bool:
        """Keep a message; False if it is dropped."""
        self._bytes += EARLY_MESSAGE + _size(received)
        left = received["type"] == "websocket.disconnect"
        if self._bytes > EARLY_BYTES and not left:
            if self._stops or not _stops(received):
                return False
            self._stops = True
        self._kept.append(received)
        return True

    def take(self) -> dict[str, Any]:
        """The oldest message."""
        return self._kept.popleft()


def _size(received: dict[str, Any]) -> int:
    return len(received.get("bytes") or (received.get("text") or "").encode())


def _stops(received: dict[str, Any]) -> bool:
    try:
        return isinstance(parse(received.get("text") or ""), StopAsked)
    except InputError:
        return False


class LiveConnection:
    """Serves one client until it or its session ends.

    make: called when the client starts a session.
    """

    def __init__(self, socket: WebSocket, make: MakeSession, limits: ServerLimits) -> None:
        self._socket, self._make, self._limits = socket, make, limits
        self._session: LiveSession | None = None
        self._peer: RtcPeer | None = None
        self._rate = 16000
        self._sending = asyncio.Lock()
        self._early = EarlyMessages()
        self._noted = False

    async def run(self) -> None:
        """Read the start message, then serve the session."""
        try:
            start = await asyncio.wait_for(self._first_message(), self._limits.start_s)
        except TimeoutError:
            await self._send({"type": "error", "message": "session.start: none came; connect again"})
            return
        if start is None:
            return
        self._rate = start.rate
        try:
            prompt = None if start.prompt is None else check_prompt(start.prompt)
            if start.format == "webrtc" and not start.sdp:
                raise InputError("sdp: is missing; format webrtc needs the offer of a peer connection")
            async with AsyncExitStack() as stack:
                session = self._session = await self._meanwhile_read(self._open(prompt, stack))
                await self._serve(session, start)
        except OmniAvatarError as error:
            await self._error(error)
        finally:
            self._session = None

    async def _first_message(self) -> Start | None:
        while (received := await self._receive()) is not None:
            text = received.get("text")
            try:
                self._check_size(received)
                message = parse(text) if text is not None else None
                if isinstance(message, Start):
                    return message
                if isinstance(message, Ping):
                    await self._send({"type": "session.pong"})
                    continue
                raise InputError("session: is not started; send session.start first")
            except InputError as error:
                await self._error(error)
        return None

    async def _open(self, prompt: str | None, stack: AsyncExitStack) -> LiveSession:
        return await stack.enter_async_context(await in_thread(self._make, prompt))

    async def _meanwhile_read(self, opening: Coroutine[Any, Any, LiveSession]) -> LiveSession:
        """What `opening` returns. Messages that come before are kept for the session.

        Behind a message that nobody reads lies the client's answer to a ping, so its connection would end.
        """
        task, dropped = asyncio.create_task(opening), False
        try:
            while not task.done():
                reading = asyncio.create_task(self._socket.receive())
                try:
                    await asyncio.wait({task, reading}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    reading.cancel()  # a message that it did not take yet stays for the next one
                if reading.done():
                    early = dict(reading.result())
                    if not self._early.add(early) and not dropped:
                        dropped = True
                        await self._error(InputError(_TOO_EARLY))
                    if early["type"] == "websocket.disconnect":
                        break
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _serve(self, session: LiveSession, start: Start) -> None:
        """Run reader and writer until one of them ends."""
        write = self._write_peer(session, start.sdp) if start.sdp else self._write_stream(session)
        tasks = [asyncio.create_task(write), asyncio.create_task(self._read(session))]
        try:
            finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                await self._send(done_message(session.stats(), task.result()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._peer is not None:
                await self._peer.close()

    async def _write_stream(self, session: LiveSession) -> str:
        """Send fragmented MP4; returns why it ended."""
        announced, shown = False, 0
        writer = StreamWriter(session.size, session.exact_fps, session.rate)
        with writer:
            async for chunk in session:
                first = round(chunk.time * session.exact_fps)
                skipped, shown = (first - shown if announced else 0), first + len(chunk.frames)
                data = await in_thread(writer.add, chunk.frames, chunk.audio, skipped)
                if not announced:
                    announced = True
                    await self._send(start_message(session.size, session.fps, session.rate, writer.mime))
                stats = session.stats()
                async with self._sending:
                    await self._send_now(chunk_message(chunk, stats, len(data)), data)
                await self._note(slow_note(stats))
        return "finished"

    async def _write_peer(self, session: LiveSession, sdp: str) -> str:
        """Send frames over a peer connection; returns why it ended."""
        from omniavatar.live.webrtc import RtcPeer

        loop = asyncio.get_running_loop()
        peer = self._peer = RtcPeer(session, lambda error: loop.create_task(self._error(error)))
        answer = await peer.answer(sdp)
        await self._send({**start_message(session.size, session.fps, session.rate, None), "sdp": answer})
        gone = asyncio.create_task(peer.gone())
        try:
            async for chunk in session:
                if gone.done():
                    return "the peer connection ended"
                if peer.connected:
                    peer.output.add(chunk)
                stats = session.stats()
                stats = replace(stats, dropped=stats.dropped + peer.output.video.dropped)
                await self._send(chunk_message(chunk, stats, None))
                await self._note(slow_note(stats))
        finally:
            gone.cancel()
        return "finished"

    async def _read(self, session: LiveSession) -> str:
        """Carry out the client's messages; returns why it ended."""
        while True:
            try:
                received = await asyncio.wait_for(self._receive(), self._limits.idle_s)
            except TimeoutError:
                return f"no message came for {self._limits.idle_s:g} s; send session.ping to stay"
            if received is None:
                return "the client left"
            try:
                reason = await self._carry_out(session, received)
            except OmniAvatarError as error:
                await self._error(error)
                continue
            if reason is not None:
                return reason

    async def _carry_out(self, session: LiveSession, received: dict[str, Any]) -> str | None:
        """Why the session ends; None if it goes on."""
        data, text = received.get("bytes"), received.get("text")
        self._check_size(received)
        if data is not None:
            session.push_audio(data, self._rate)
            return None
        message = parse(text or "")
        if isinstance(message, Audio):
            session.push_audio(message.samples(), message.rate)
            if message.last:
                session.end_speech()
        elif isinstance(message, Interrupt):
            session.interrupt()
        elif isinstance(message, Interaction):
            session.set_prompt(message.event.prompt)
            await self._send({"type": "session.interaction.queued", "event_id": message.event_id})
        elif isinstance(message, Ping):
            await self._send({"type": "session.pong"})
        elif isinstance(message, Start):
            raise InputError("session.start: the session runs already; stop it first, or connect again")
        elif isinstance(message, StopAsked):
            if not message.drain:
                return "stopped"
            session.end()
        return None

    def _check_size(self, received: dict[str, Any]) -> None:
        """Raise InputError for a message that is too long."""
        size, most = _size(received), self._limits.message_bytes
        if size > most:
            raise InputError(f"message: has {size:,} bytes, the most is {most:,}; send smaller ones")

    async def _receive(self) -> dict[str, Any] | None:
        """The next message; None if the client has gone."""
        if self._early:
            await asyncio.sleep(0)  # other sessions go on while this one catches up
            received = self._early.take()
        else:
            received = dict(await self._socket.receive())
        return None if received["type"] == "websocket.disconnect" else received

    async def _note(self, text: str | None) -> None:
        if text is not None and not self._noted:
            self._noted = True
            await self._send({"type": "session.note", "text": text})

    async def _error(self, error: OmniAvatarError) -> None:
        text = str(error)
        shown = for_clients(type(error), text)
        if shown != text:
            _log.error("%s", text)
        await self._send({"type": "error", "message": one_line(shown)})

    async def _send(self, values: dict[str, Any]) -> None:
        async with self._sending:
            await self._send_now(values)

    async def _send_now(self, values: dict[str, Any], data: bytes | None = None) -> None:
        """Send a message, and bytes after it; nothing if the client has gone, which the reader notices."""
        from starlette.websockets import WebSocketDisconnect

        try:
            await self._socket.send_text(json_text(values))
            if data is not None:
                await self._socket.send_bytes(data)
        except WebSocketDisconnect:
            return
        except RuntimeError as error:  # the connection is closed, perhaps by a ping without an answer
            states = {self._socket.client_state.name, self._socket.application_state.name}
            if states == {"CONNECTED"} and "websocket.close" not in str(error):
                raise
