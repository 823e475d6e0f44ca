"""What a client of the live server sends or does while its session opens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.websockets import WebSocket
from websockets.sync.client import connect

from live_makers import LoudnessMaker
from live_server import gone, served
from omniavatar.live import LiveSession, LiveStage
from omniavatar.live.connection import EARLY_BYTES, EARLY_MESSAGE, EarlyMessages, LiveConnection
from omniavatar.live.limits import ServerLimits

START = {"type": "websocket.receive", "text": '{"type": "session.start"}'}
STOP = {"type": "websocket.receive", "text": '{"type": "session.stop"}'}
LEFT = {"type": "websocket.disconnect", "code": 1001}


def sound(size: int) -> dict[str, Any]:
    return {"type": "websocket.receive", "bytes": bytes(size)}


def kept(early: EarlyMessages) -> list[dict[str, Any]]:
    return [early.take() for _ in range(len(early))]


@pytest.mark.parametrize("make", [lambda: sound(0), lambda: {"type": "websocket.receive", "text": ""}])
def test_messages_without_a_byte_are_limited_too(make: Callable[[], dict[str, Any]]) -> None:
    early, most = EarlyMessages(), EARLY_BYTES // EARLY_MESSAGE
    assert [early.add(make()) for _ in range(most + 5)] == [True] * most + [False] * 5
    assert len(early) == most


def test_text_counts_as_its_bytes() -> None:
    early = EarlyMessages()
    assert early.add(
        {"type": "websocket.receive", "text": "\N{GRINNING FACE}" * (EARLY_BYTES // 4 - EARLY_MESSAGE)}
    )
    assert not early.add({"type": "websocket.receive", "text": "x" * 4 * EARLY_MESSAGE})


def test_of_too_much_the_clients_end_is_kept() -> None:
    early = EarlyMessages()
    full = sound(EARLY_BYTES - EARLY_MESSAGE)
    given = [full, sound(2), STOP, sound(2), STOP, {**STOP, "text": "no JSON"}, LEFT]
    assert [early.add(each) for each in given] == [True, False, True, False, False, False, True]
    assert kept(early) == [full, STOP, LEFT]


def talk(client: Any) -> list[dict[str, Any]]:
    """The server's text messages until the session is done."""
    received: list[dict[str, Any]] = []
    while not received or received[-1]["type"] != "session.done":
        message = client.recv(timeout=60)
        if isinstance(message, str):
            received.append(json.loads(message))
    return received


@pytest.mark.slow
def test_a_client_that_sends_20_megabytes_early_is_told_once_and_keeps_its_session() -> None:
    with served(opens_s=0.7) as server, connect(server.address()) as client:
        client.send(json.dumps({"type": "session.start", "rate": 48000}))
        for _ in range(20):
            client.send(bytes(2**20))
        client.send(json.dumps({"type": "session.stop"}))
        received = talk(client)
    errors = [each["message"] for each in received if each["type"] == "error"]
    assert [each for each in errors if each.startswith("session: it is not open yet, and 16 MB wait")] == [
        errors[0]
    ]
    assert received[-1]["reason"] == "stopped"
    assert gone(server)


def test_errors_for_a_client_that_has_left_are_dropped() -> None:
    """Sends fail while messages of it still wait, so the server does not know yet that it has left."""
    stage = LiveStage()
    script = [{"type": "websocket.connect"}, START, sound(1), sound(1), sound(1), LEFT]

    async def receive() -> dict[str, Any]:
        if len(script) == 4:  # the session is open
            while not stage.sessions:
                await asyncio.sleep(0.01)
        return script.pop(0)

    async def send(message: Any) -> None:
        if message["type"] != "websocket.accept":
            raise OSError("the client has left")

    async def serve() -> None:
        socket = WebSocket({"type": "websocket", "headers": []}, receive, send)
        await socket.accept()
        await LiveConnection(socket, lambda _: LiveSession.on(stage, LoudnessMaker), ServerLimits()).run()

    asyncio.run(serve())
    assert not script and not stage.sessions


@pytest.mark.slow
def test_a_server_that_stops_while_a_session_opens_says_so_in_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with ExitStack() as after, served(opens_s=2.5) as server:
        client = after.enter_context(connect(server.address()))
        client.send(json.dumps({"type": "session.start"}))
        client.send(json.dumps({"type": "session.ping"}))
        time.sleep(0.2)
    assert "Traceback" not in capfd.readouterr().err
