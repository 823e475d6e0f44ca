"""Clients that send slowly, against a real server."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

import httpx

from serve_api import Serve
from serve_server import listening

HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


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
            for text in (answer, silent.recv(65536)):
                assert text.startswith(b"HTTP/1.1 408 ") and b"upload_timeout" in text, text
        assert not server.folders and server.store.unfinished() == 0
