"""Who may use a live server, and how much: origin, host name, token, limits."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class ServerLimits:
    """What a live server allows.

    - sessions: open at a time.
    - message_bytes: of one message.
    - idle_s: seconds without a message from the client after which its session ends.
    - start_s: seconds that a connection may take until `session.start`.
    - gone_s: seconds without a sign of the client's machine, while it owes one, that end its connection.
    - hung_s: seconds without an answer of the client's program to a ping that end its connection.
    """

    sessions: int = 4
    message_bytes: int = 2**20
    idle_s: float = 60.0
    start_s: float = 20.0
    gone_s: float = 0.8
    hung_s: float = 5.0


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _host(origin: str) -> str | None:
    """Host and port of an `Origin`; None if it has none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _host_name(host: str) -> str:
    """The name in a `Host` header; empty if it has none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True)
class Door:
    """Decides which requests are let in.

    - loopback: the server is bound to loopback; then only loopback names may be used for it. Otherwise a
      foreign page could reach it under a name that leads here.
    - token: that each request must bring; None: no token.
    - origins: of pages on other servers that may connect, such as https://example.org.
    """

    loopback: bool
    token: str | None
    origins: tuple[str, ...] = ()

    def refusal(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """Why a request is refused, in one line; None if it may enter."""
        host = headers.get("host", "")
        if self.loopback and not is_loopback(_host_name(host)):
            return "host: this server is for this machine only; use http://127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and _host(origin) != host and origin not in self.origins:
            return "origin: a page of another server may not connect; allow it with --origin"
        if self.token is None:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ") or query.get("token", "")
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return None
        return "token: is missing or wrong; open the address that the server printed"
