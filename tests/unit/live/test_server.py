"""The live server over loopback, with a real WebSocket client."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import io
import json
import re
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urljoin

import av
import numpy as np
import pytest
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from live_makers import impulse, tone
from live_server import Served, gone, served
from omniavatar.errors import CheckpointError, ConfigError, InputError, OmniAvatarError, ResourceError
from omniavatar.live import LiveSession
from omniavatar.live.connection import in_thread
from omniavatar.live.limits import Door, ServerLimits, is_loopback
from omniavatar.live.server import make_app
from omniavatar.live.stage import SessionsFullError


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def pcm(samples: np.ndarray) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def say(client: ClientConnection, kind: str, **values: Any) -> None:
    client.send(json.dumps({"type": kind, **values}))


def until(client: ClientConnection, kind: str, timeout: float = 60.0) -> list[dict[str, Any] | bytes]:
    """Messages up to the first one of type `kind`."""
    received: list[dict[str, Any] | bytes] = []
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        message = client.recv(timeout=timeout)
        received.append(message if isinstance(message, bytes) else json.loads(message))
        if isinstance(last := received[-1], dict) and last["type"] == kind:
            return received
    raise AssertionError(f"no {kind} in {timeout} s")


def test_sound_goes_in_and_video_in_sync_comes_out(server: Served) -> None:
    with connect(server.address()) as client:
        say(client, "session.start", prompt="A woman talks", format="m4s", rate=24000)
        client.send(pcm(impulse(0.5, 0.3, 24000)))
        say(client, "session.stop", drain=True)
        received = until(client, "session.done")
    start = next(each for each in received if isinstance(each, dict) and each["type"] == "video.start")
    assert start["mime"].startswith('video/mp4; codecs="avc1.') and start["fps"] == 25
    metadata = [e for e in received if isinstance(e, dict) and e["type"] == "video.chunk_metadata"]
    pieces = [each for each in received if isinstance(each, bytes)]
    assert [each["bytes"] for each in metadata] == [len(piece) for piece in pieces]
    assert any(each["speaking"] for each in metadata) and any(each["delay"] for each in metadata)
    seen, heard = bright_and_loud(b"".join(pieces))
    assert 0 <= heard - seen <= 0.040
    assert received[-1]["reason"] == "finished"  # type: ignore[index, call-overload]
    assert gone(server)


@pytest.mark.slow
def test_a_model_may_open_long_after_the_microphone_does() -> None:
    """As on a slow machine, or with a large model: the client is answered, keeps its place, and is heard."""
    with served(ServerLimits(hung_s=0.5), opens_s=1.2) as server, connect(server.address()) as client:
        say(client, "session.start", rate=24000)
        for piece in np.split(impulse(0.5, 0.3, 24000), 24):
            client.send(pcm(piece))
        begun = time.monotonic()
        assert urllib.request.urlopen(server.page()).status == 200
        assert not server.makers and time.monotonic() - begun < 1.2, "other visitors need not wait"
        say(client, "session.stop", drain=True)
        received = until(client, "session.done")
        assert received[-1]["reason"] == "finished"  # type: ignore[index, call-overload]
        assert any(isinstance(each, dict) and each.get("speaking") for each in received)


def test_a_client_that_leaves_while_its_session_opens_frees_it() -> None:
    with served(opens_s=0.2) as server:
        with connect(server.address()) as client:
            say(client, "session.start")
        ends = time.monotonic() + 20
        while not (server.makers and server.makers[0].closed):
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert gone(server)


def bright_and_loud(data: bytes) -> tuple[float, float]:
    """Times of the brightest frame and of the loudest sample, in seconds."""
    light, sound = [], []
    with av.open(io.BytesIO(data)) as container:
        for frame in container.decode():
            if isinstance(frame, av.VideoFrame):
                light.append((frame.to_ndarray(format="gray").mean(), frame.time))
            else:
                values = np.abs(frame.to_ndarray()[0])
                sound.append((values.max(), frame.time + values.argmax() / frame.sample_rate))
    return max(light)[1], max(sound)[1]


def test_interrupt_prompt_and_ping(server: Served) -> None:
    with connect(server.address()) as client:
        say(client, "session.start")
        until(client, "video.start")
        for _ in range(4):
            say(client, "session.audio", audio=base64.b64encode(pcm(tone(0.5))).decode(), rate=16000)
        say(client, "session.ping")
        until(client, "session.pong")
        say(client, "session.interrupt")
        say(client, "session.interaction", event_id="e1", event={"prompt": "A man laughs"})
        queued = until(client, "session.interaction.queued")[-1]
        assert queued == {"type": "session.interaction.queued", "event_id": "e1"}
        time.sleep(0.5)
        say(client, "session.stop")
        received = until(client, "session.done")
    last = [e for e in received if isinstance(e, dict) and e["type"] == "video.chunk_metadata"][-1]
    assert last["waiting"] == 0 and not last["speaking"]
    assert server.makers[-1].prompts == ["A man laughs"]
    assert received[-1]["reason"] == "stopped"  # type: ignore[index, call-overload]


BAD: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("hello", "is not JSON"),
    "no type": ("{}", "type"),
    "unknown type": ('{"type": "session.dance"}', "session.dance"),
    "rate 0": ('{"type": "session.audio", "audio": "AAAA", "rate": 0}', "session.audio.rate"),
    "NaN": ('{"type": "session.audio", "audio": "AAAA", "rate": NaN}', "is not JSON"),
    "text as sound": ('{"type": "session.audio", "audio": "héllo"}', "not base64"),
    "odd bytes": (b"abc", "whole 16-bit samples"),
    "10 MB": (bytes(10_000_000), "the most is"),
    "second start": ('{"type": "session.start"}', "runs already"),
    "long prompt": (
        json.dumps({"type": "session.interaction", "event": {"prompt": "word " * 10_000}}),
        "prompt: has 50,000 characters",
    ),
}


def test_each_bad_message_is_one_error_and_the_session_goes_on(server: Served) -> None:
    with connect(server.address(), max_size=None) as client:
        say(client, "session.start")
        until(client, "video.start")
        for name, (message, text) in BAD.items():
            client.send(message)
            error = until(client, "error")[-1]
            assert isinstance(error, dict) and text in error["message"], name
            assert "\n" not in error["message"]
        client.send(pcm(tone(0.3)))
        seen = [until(client, "video.chunk_metadata")[-1] for _ in range(12)]
        assert any(isinstance(each, dict) and each["speaking"] for each in seen)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ('{"type": "session.interrupt"}', "not started"),
        (b"\0\0", "not started"),
        ('{"type": "session.start", "prompt": ""}', "prompt: is empty"),
        ('{"type": "session.start", "format": "gif"}', "format"),
        ('{"type": "session.start", "format": "webrtc"}', "sdp: is missing"),
        ('{"type": "session.start", "format": "webrtc", "sdp": "nonsense"}', "sdp: is not an offer"),
    ],
)
def test_bad_starts(server: Served, message: str | bytes, text: str) -> None:
    with connect(server.address()) as client:
        client.send(message)
        error = until(client, "error")[-1]
        assert isinstance(error, dict) and text in error["message"]
    assert gone(server)


@pytest.mark.parametrize(
    "leave", [lambda client: client.close(), lambda client: client.socket.close()], ids=["closed", "cut"]
)
def test_a_client_that_leaves_frees_its_session(
    server: Served, leave: Callable[[ClientConnection], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server.address()) as client:
        say(client, "session.start")
        until(client, "video.start")
        assert server.stage.sessions == 1
        leave(client)
        assert gone(server)
    assert server.makers[-1].closed
    assert capfd.readouterr().err == "", "leaving is no error"


def handshake(server: Served, read_buffer: int | None = None) -> socket.socket:
    """A client without a library: its WebSocket is open, and it has started a session."""
    client = socket.socket()
    if read_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_buffer)
    client.connect(("127.0.0.1", server.port))
    client.sendall(
        b"GET /v1/realtime/video HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
    )
    text = b'{"type": "session.start"}'
    received = b""
    for waited, answer in (
        (b"\r\n\r\n", bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text),
        (b"delay", b""),
    ):
        while waited not in received:
            more = client.recv(1000)
            assert more, received
            received += more
        client.sendall(answer)
    return client


def drop_what_comes(client: socket.socket) -> object:
    """Let the client's system neither receive nor acknowledge, as if it were off. Keep the result."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # "return 0 bytes"
    pointer = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
    client.setsockopt(socket.SOL_SOCKET, 26, pointer)  # SO_ATTACH_FILTER
    return program


linux = pytest.mark.skipif(sys.platform != "linux", reason="the numbers of a connection are Linux's")


@linux
def test_a_machine_that_vanishes_frees_its_session_within_a_second() -> None:
    """What is left of the second is for a busy machine: naps do not slow down the clock of the system."""
    assert ServerLimits().gone_s < 1
    with served(ServerLimits(gone_s=0.4)) as server, handshake(server) as client:
        assert server.stage.sessions == 1
        program = drop_what_comes(client)
        assert gone(server)
        del program


@linux
@pytest.mark.slow
def test_a_client_that_stops_reading_has_not_vanished() -> None:
    """Its system answers, though what is sent no longer fits: frames are dropped, and it may go on."""
    with served(ServerLimits(gone_s=0.5, hung_s=30), send_buffer=4096) as server:
        with handshake(server, read_buffer=2048) as client:
            time.sleep(3)
            assert server.stage.sessions == 1
            client.settimeout(5)
            assert client.recv(1000), "it goes on"
        assert gone(server)


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["room", "full"])
def test_a_client_that_answers_no_ping_frees_its_session(
    full: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when so much waits for it that its connection cannot be closed in good order."""
    limits, buffers = ServerLimits(hung_s=2.0 if full else 0.5), {"send_buffer": 4096} if full else {}
    with served(limits, **buffers) as server, handshake(server, 2048 if full else None) as client:
        assert server.stage.sessions == 1
        noise = np.random.default_rng(0).integers(-9999, 9999, 32000).astype("<i2").tobytes()
        client.sendall(struct.pack(">BBHI", 0x82, 0x80 | 126, len(noise), 0) + noise)
        begun = time.monotonic()
        while server.stage.sessions:
            assert time.monotonic() < begun + 20
            time.sleep(0.02)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("cancels", [1, 2])
def test_a_cancelled_task_ends_after_its_thread(cancels: int) -> None:
    """The connection closes its encoder then, which must not be at work."""
    ended = threading.Event()

    def work(begun: threading.Event) -> None:
        begun.set()
        time.sleep(0.1)
        ended.set()

    async def stopped() -> None:
        begun = threading.Event()
        task = asyncio.create_task(in_thread(work, begun))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(stopped())


def test_limits_of_sessions_and_idle_time() -> None:
    with served(ServerLimits(sessions=1, idle_s=0.6, start_s=0.5)) as server:
        with connect(server.address()) as client, connect(server.address()) as second:
            assert "has 1 sessions" in until(second, "error")[-1]["message"]  # type: ignore[index, call-overload]
            with pytest.raises(ConnectionClosed):
                second.recv(timeout=2)
            say(client, "session.start")
            done = until(client, "session.done")[-1]
            assert "no message came for 0.6 s" in done["reason"]  # type: ignore[index, call-overload]
        with connect(server.address()) as silent:
            assert "none came" in until(silent, "error")[-1]["message"]  # type: ignore[index, call-overload]


def test_origin_host_and_token() -> None:
    door = Door(loopback=False, token="secret", origins=("https://friend.example",))

    def refusal(origin: str | None = None, token: str = "secret", host: str = "live.example") -> str | None:
        headers = {"host": host} | ({} if origin is None else {"origin": origin})
        return door.refusal(headers, {"token": token})

    assert refusal() is None and refusal("https://live.example") is None
    assert refusal("https://friend.example") is None
    assert "origin" in str(refusal("https://evil.example"))
    assert "token" in str(refusal(token="wrong")) and "token" in str(refusal(token=""))
    assert door.refusal({"host": "live.example", "authorization": "Bearer secret"}, {}) is None
    local = Door(loopback=True, token=None)
    assert (
        local.refusal({"host": "127.0.0.1:80"}, {}) is None and local.refusal({"host": "[::1]:8"}, {}) is None
    )
    assert "host" in str(local.refusal({"host": "evil.example"}, {})), "another name that leads here"
    assert "host" in str(local.refusal({"host": "["}, {})), "what is no host name"
    assert "origin" in str(refusal("http://[")) and "origin" in str(refusal("null"))
    assert is_loopback("localhost") and not is_loopback("0.0.0.0") and not is_loopback("example.org")


def test_the_door_guards_page_and_socket() -> None:
    with served(door=Door(True, "secret")) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(server.page())
        assert refused.value.code == 403 and b"token" in refused.value.read()
        page = urllib.request.urlopen(server.page("?token=secret"))
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        assert b"omniavatar live" in page.read()
        with connect(server.address()) as client:
            assert "token" in until(client, "error")[-1]["message"]  # type: ignore[index, call-overload]
        with connect(server.address("?token=secret"), origin="http://evil.example") as client:  # type: ignore[arg-type]
            assert "origin" in until(client, "error")[-1]["message"]  # type: ignore[index, call-overload]


@pytest.mark.parametrize("token", ["secret", 'a b&c=ü"<'])
def test_the_page_of_a_server_with_a_token_has_its_scripts_and_styles(token: str) -> None:
    with served(door=Door(True, token)) as server:
        address = server.page(f"?token={quote(token)}")
        links = re.findall(r'(?:src|href)="([^"]+)"', urllib.request.urlopen(address).read().decode())
        assert {link.partition("?")[0] for link in links} == {"page.js", "style.css"}
        for link in links:
            assert urllib.request.urlopen(urljoin(address, link)).status == 200


def test_a_start_has_the_limit_of_a_message_too(server: Served) -> None:
    with connect(server.address()) as client:
        say(client, "session.start", format="webrtc", sdp="v=0\n" * 500_000)
        error = until(client, "error")[-1]
        assert isinstance(error, dict) and "the most is 1,048,576" in error["message"]
        say(client, "session.start")
        until(client, "video.start")
    assert gone(server)


def test_a_slow_model_is_announced() -> None:
    with served(seconds=0.3) as server, connect(server.address()) as client:
        say(client, "session.start")
        client.send(pcm(tone(1.0)))
        note = until(client, "session.note")[-1]
        assert isinstance(note, dict) and "s of video a second" in note["text"]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (CheckpointError("/models/dit.pt: not found; fetch it"), "weights"),
        (ResourceError("cuda:0 on 10.1.2.3 has too little memory"), "memory"),
        (SessionsFullError("live: the open sessions take 74%; close one"), "open sessions leave no time"),
        (ConfigError("configs/live.yaml:3: dtype: is wrong"), "tell who runs it"),
        (InputError("prompt: is empty; describe the person"), "prompt: is empty; describe the person"),
    ],
)
def test_a_client_reads_no_path_of_the_server(
    error: OmniAvatarError, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(prompt: str | None) -> LiveSession:
        raise error

    app = make_app(fail, Door(True, None), ServerLimits())
    with TestClient(app).websocket_connect("/v1/realtime/video", headers={"host": "localhost"}) as client:
        client.send_json({"type": "session.start", "format": "m4s"})
        message = client.receive_json()
    assert message["type"] == "error" and shown in message["message"]
    assert not {"/models", "10.1.2.3", "configs/"} & set(message["message"].replace(":", " ").split())
    assert ("omniavatar.live" in {each.name for each in caplog.records}) != isinstance(error, InputError)
