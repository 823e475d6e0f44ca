"""Notices that a client's machine has vanished from the network: what was sent to it is not acknowledged.

A client that is slow, or has stopped reading, still acknowledges, because its system does. A WebSocket's ping
cannot tell the two apart, and waits behind the video that a slow client has not read. The system's
`TCP_USER_TIMEOUT` would end both. Linux only: on other systems the ping ends them later.
Source: `struct tcp_info` of linux/tcp.h.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LOOK_S = 0.1
CLOSING_S = 2.0
"""Seconds until a close drops what is not sent yet. A client that reads nothing would keep it open."""
RTTS = 2
"""Round trips of the connection that are added to the time of silence, so that a long way is no silence."""
_NUMBERS = struct.Struct("8x16I")


@dataclass(frozen=True)
class Answers:
    """What the system knows of a connection.

    - waiting: packets that were sent and are not acknowledged.
    - silent_s: seconds since the other machine acknowledged something.
    - round_trip_s: usual seconds until it does.
    """

    waiting: int
    silent_s: float
    round_trip_s: float


def answers_of(connection: socket.socket) -> Answers:
    """The newest numbers of a TCP connection; where the system has none, nothing ever waits."""
    if sys.platform != "linux":
        return Answers(0, 0.0, 0.0)
    values = _NUMBERS.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _NUMBERS.size))
    return Answers(values[4], values[12] / 1e3, values[15] / 1e6)


class Silence:
    """Seconds for which a machine has owed an answer. clock: seconds, as `time.monotonic`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None

    def seconds(self, answers: Answers) -> float:
        """0 while nothing waits, or while answers come within usual round trips."""
        now = self._clock()
        if not answers.waiting:
            self._since = None
            return 0.0
        self._since = now if self._since is None else self._since
        owed = now - max(self._since, now - answers.silent_s)
        return max(0.0, owed - RTTS * answers.round_trip_s)


async def end_vanished(transport: asyncio.Transport, most_s: float) -> None:
    """Cut the connection when its client owes an answer for `most_s` seconds, or does not let it close."""
    connection, silence, closing = transport.get_extra_info("socket"), Silence(), 0.0
    while closing < CLOSING_S:
        await asyncio.sleep(LOOK_S)
        if transport.is_closing():
            closing += LOOK_S
        elif silence.seconds(answers_of(connection)) > most_s:
            break
    transport.abort()


def watching(protocol: Any, most_s: float) -> type[Any]:
    """A protocol of WebSockets, such as uvicorn's, whose connections end as `end_vanished` says."""

    class Watching(protocol):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.watch = asyncio.get_running_loop().create_task(end_vanished(transport, most_s))

        def connection_lost(self, error: Exception | None) -> None:
            self.watch.cancel()
            super().connection_lost(error)

    return Watching
