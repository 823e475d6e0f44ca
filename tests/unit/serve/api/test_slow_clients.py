"""Clients that send slowly, or send what takes long to check, against a real server."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from omniavatar.serve.api.checks import DirectChecker
from omniavatar.serve.api.turns import THREADS
from serve_api import FILES, Serve
from serve_server import listening

HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def rest(client: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    parts = []
    with suppress(ConnectionResetError):  # the server closes while the client still sends
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_body_that_arrives_too_slowly_is_refused_and_others_are_served(serve: Serve) -> None:
    """One client sends nothing more, another a byte now and then: the limit is of the whole body."""
    server = serve(upload_seconds=0.5)
    with listening(server) as address:
        parts = urlsplit(address)
        silent, drip = (socket.create_connection((parts.hostname, parts.port)) for _ in range(2))
        with silent, drip:
            for client in (silent, drip):
                client.settimeout(20)
                client.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
            began = time.monotonic()
            assert httpx.get(f"{address}/v1/videos").status_code == 200
            drip.settimeout(0.05)
            answer = b""
            while not answer:
                drip.sendall(b" ")
                try:
                    answer = drip.recv(65536)
                except TimeoutError:
                    assert time.monotonic() - began < 20
            drip.settimeout(20)
            for text in (answer + rest(drip), rest(silent)):
                assert text.startswith(b"HTTP/1.1 408 ") and b"upload_timeout" in text, text
        assert not server.folders and server.store.unfinished() == 0


class SlowChecker(DirectChecker):
    """A checker that waits."""

    def __init__(self) -> None:
        super().__init__(10**6, 60.0)
        self.go = threading.Event()
        self.began: list[Path | None] = []

    def check(self, portrait: Path | None, voice: Path | None) -> tuple[tuple[int, int] | None, float | None]:
        self.began.append(portrait)
        assert self.go.wait(60)
        return super().check(portrait, voice)


def test_uploads_that_take_long_to_check_leave_threads_for_other_requests(serve: Serve) -> None:
    """There are more of them than threads of the whole server."""
    checker = SlowChecker()
    server = serve(checker=checker)
    with listening(server) as address, ThreadPoolExecutor(48) as pool:
        posts = [
            pool.submit(httpx.post, f"{address}/v1/videos", data={"prompt": "x"}, files=FILES, timeout=60)
            for _ in range(48)
        ]
        end = time.monotonic() + 30
        while len(checker.began) < THREADS:
            assert time.monotonic() < end
            time.sleep(0.01)
        for path in ("/health", "/ready", "/v1/videos"):
            assert httpx.get(f"{address}{path}", timeout=20).status_code == 200
        assert len(checker.began) == THREADS
        checker.go.set()
        assert [post.result(60).status_code for post in posts] == [200] * 48


def test_a_bug_and_a_client_that_leaves_cost_no_connection_of_others(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()

    @server.app.get("/boom")
    def boom() -> None:
        raise RuntimeError("secret")

    with listening(server) as address:
        with httpx.Client(base_url=address, timeout=20) as client:
            assert [client.get("/boom").status_code for _ in range(3)] == [500] * 3
            assert client.get("/health").status_code == 200
        assert caplog.text.count("a bug in this server") == 3
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname, parts.port)) as leaving:
            leaving.sendall(HEAD + b"Content-Length: 100000\r\n\r\n{")
        end = time.monotonic() + 20
        while 'kind="client_left"' not in httpx.get(f"{address}/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert caplog.text.count("a bug in this server") == 3 and not server.folders
