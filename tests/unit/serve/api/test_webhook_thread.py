"""Webhooks from the thread of a server: slow receivers, names and redirects that lead inside, the end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from omniavatar.serve.api.addresses import DeliveryError, Outside
from omniavatar.serve.api.webhooks import Webhooks
from omniavatar.serve.jobs.tables import webhooks
from serve_api import Serve, Server
from web_site import Site
from web_site import site as site

SECRET = "s" * 32
WAIT_S = 30.0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def dripping() -> Iterator[tuple[str, list[socket.socket]]]:
    """The address of a receiver that sends a byte of a header now and then, and its connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []
    over = threading.Event()

    def drip() -> None:
        listener.settimeout(0.05)
        while not over.is_set():
            try:
                taken.append(listener.accept()[0])
                taken[-1].sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            except TimeoutError:
                pass
            for connection in taken:
                try:
                    connection.sendall(b"x")
                except OSError:
                    continue

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", taken
    finally:
        over.set()
        thread.join()
        for connection in (listener, *taken):
            connection.close()


def waiting(server: Server) -> int:
    with server.store.database.reading() as connection:
        return len(connection.execute(webhooks.select()).all())


def test_the_server_delivers_from_a_thread_that_ends_with_it(serve: Serve, site: Site) -> None:
    server = serve(webhook_secret=SECRET, private_urls=True)
    with server.client:
        server.create(webhook_url=f"http://127.0.0.1:{site.port}/hook")
        server.finish()
        until(lambda: len(site.posts) == 1)
        until(lambda: waiting(server) == 0)
        assert "webhooks" in [thread.name for thread in threading.enumerate()]
    assert "webhooks" not in [thread.name for thread in threading.enumerate()]


def test_a_request_has_one_deadline_for_all_its_bytes() -> None:
    with dripping() as (address, _):
        began = time.monotonic()
        with pytest.raises(DeliveryError, match="no answer"):
            Outside(private=True).post(address, b"{}", {}, 0.5)
        assert time.monotonic() - began < 5


def test_a_slow_receiver_delays_no_other_and_not_the_end(serve: Serve, site: Site) -> None:
    server = serve(webhook_secret=SECRET, private_urls=True)
    with dripping() as (address, taken):
        for url in (address, f"http://127.0.0.1:{site.port}/hook"):
            server.create(webhook_url=url)
            server.finish()
        hooks = Webhooks(server.store, Outside(private=True), SECRET, tries=3, seconds=600.0)
        hooks.start()
        until(lambda: len(site.posts) == 1 and len(taken) == 1 and waiting(server) == 1)
        began = time.monotonic()
        hooks.stop()
        assert time.monotonic() - began < 10
    assert waiting(server) == 1, "it is tried again after the next start"


@pytest.mark.parametrize("inside", ["10.0.0.1", "127.0.0.1", "169.254.169.254", "::1"])
def test_a_name_that_leads_inside_gets_no_webhook(serve: Serve, site: Site, inside: str) -> None:
    server = serve(webhook_secret=SECRET)
    server.create(webhook_url=f"http://receiver.example:{site.port}/hook")
    server.finish()
    asked: list[str] = []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return [inside]

    assert Webhooks(server.store, Outside(resolver=resolver), SECRET, tries=1).turn() == 0
    assert asked == ["receiver.example"] and not site.posts and waiting(server) == 0


def test_a_redirect_of_a_webhook_is_not_followed(serve: Serve, site: Site) -> None:
    server = serve(webhook_secret=SECRET)
    server.create(webhook_url=f"http://receiver.example:{site.port}/hook")
    server.finish()
    site.status, site.location = 307, f"http://127.0.0.1:{site.port}/inside"
    outside = Outside(private=True, resolver=lambda host, port: ["127.0.0.1"])
    assert Webhooks(server.store, outside, SECRET, tries=2).turn() == 0
    assert site.paths == ["/hook"] and waiting(server) == 1
