"""A live server in a thread of the test, with small makers."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from live_makers import LoudnessMaker
from omniavatar.live import LiveSession, LiveStage
from omniavatar.live.limits import Door, ServerLimits
from omniavatar.live.server import listen, make_app, serve


@dataclass
class Served:
    """A running server. makers: one for each session."""

    port: int
    stage: LiveStage
    makers: list[LoudnessMaker] = field(default_factory=list)

    def address(self, query: str = "") -> str:
        return f"ws://127.0.0.1:{self.port}/v1/realtime/video{query}"

    def page(self, query: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{query}"


def gone(server: Served) -> bool:
    """Whether all sessions end within a second, counted in naps: a busy machine delays them and the server,
    which is in the same process, alike."""
    for _ in range(50):
        if not server.stage.sessions:
            return True
        time.sleep(0.02)
    return False


@contextmanager
def served(
    limits: ServerLimits | None = None,
    door: Door | None = None,
    seconds: float = 0.0,
    size: int = 16,
    send_buffer: int | None = None,
    opens_s: float = 0.0,
) -> Iterator[Served]:
    """A server on a free port; `seconds` to make a block, frames of `size`.

    opens_s: to make a session, and then to open it.
    send_buffer: bytes that the system keeps for a client that does not read.
    """
    stage, started = LiveStage(), threading.Event()
    found = Served(0, stage)
    stops = []

    def make(prompt: str | None) -> LiveSession:
        def build() -> LoudnessMaker:
            time.sleep(opens_s)
            return maker

        time.sleep(opens_s)
        maker = LoudnessMaker(seconds=seconds, size=size)
        found.makers.append(maker)
        return LiveSession.on(stage, build)

    def ready(port: int, stop: object) -> None:
        found.port = port
        stops.append(stop)
        started.set()

    limits, listening = limits or ServerLimits(), listen("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    app = make_app(make, door or Door(True, None), limits)
    thread = threading.Thread(target=serve, args=(app, listening, ready, limits))
    thread.start()
    assert started.wait(20)
    try:
        yield found
    finally:
        stops[0]()
        thread.join(20)
    assert not thread.is_alive() and stage.sessions == 0
