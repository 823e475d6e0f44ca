"""Fetches from, and posts to, addresses that a client names, without reaching into the server's own network.

The address is checked where the connection is made, after names are resolved, so neither a redirect nor a
name that changes its address (DNS rebinding) leads to a private one. A request has one deadline for all of
its parts, so a server that sends a byte now and then cannot hold it.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urljoin, urlsplit

import httpcore

from omniavatar.errors import InputError, OmniAvatarError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], Iterable[str]]

MOST_REDIRECTS = 5
MOST_URL = 2048
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)
_LOOK_S = 0.25
_ends: ContextVar[float] = ContextVar("ends")
"""When the request of this thread must be over, by the monotonic clock."""


class AddressError(InputError):
    """A URL leads where this server must not go, or nowhere."""


class DeliveryError(OmniAvatarError):
    """A webhook's receiver did not accept it."""


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public internet, also when it wraps an IPv4 address."""
    address: Address = ipaddress.ip_address(text.split("%", 1)[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast


def resolve(host: str, port: int) -> list[str]:
    """IP addresses of a host name."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def checked_url(url: str) -> str:
    """`url` if it can be one of http or https without a password. Raises AddressError."""
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname
    except ValueError:
        raise AddressError("is no valid URL; give one such as https://example.com/file") from None
    if parts.scheme not in ("http", "https") or not host or len(url) > MOST_URL:
        raise AddressError("must be an http or https URL of at most 2048 characters")
    if parts.username is not None or parts.password is not None:
        raise AddressError("must not contain a user or a password; remove them")
    if not url.isascii() or any(ord(character) <= 32 for character in url):
        raise AddressError("must not contain spaces or characters outside ASCII; percent-encode them")
    if port == 0:
        raise AddressError("must not have the port 0")
    return url


class _Timed(httpcore.NetworkStream):
    """A stream that ends at the request's deadline, or soon after `over` is set."""

    def __init__(self, inner: httpcore.NetworkStream, over: threading.Event) -> None:
        self._inner, self._over = inner, over

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            left = _ends.get() - time.monotonic()
            if left <= 0 or self._over.is_set():
                raise httpcore.ReadTimeout("the deadline of the request is over")
            try:
                return self._inner.read(max_bytes, min(left, _LOOK_S))
            except httpcore.ReadTimeout:
                continue

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, max(0.01, _ends.get() - time.monotonic()))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Timed(self._inner.start_tls(ssl_context, server_hostname, timeout), self._over)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Guarded(httpcore.NetworkBackend):
    """Connects to public addresses only, and to the very address that was checked."""

    def __init__(self, private: bool, resolver: Resolver, over: threading.Event) -> None:
        self._private, self._resolver, self._over = private, resolver, over
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        try:
            found = list(self._resolver(host, port))
        except (OSError, UnicodeError):
            raise AddressError("its host name is not known; check the URL") from None
        allowed = [address for address in found if self._private or is_public(address)]
        if not allowed or len(allowed) < len(found):
            raise AddressError("leads to a private address, which is not allowed; give a public one")
        found_stream = self._inner.connect_tcp(allowed[0], port, timeout, local_address, socket_options)
        return _Timed(found_stream, self._over)

    def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        raise AddressError("must not lead to a socket of this machine")

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class Outside:
    """A small HTTP client for addresses from outside.

    private: whether private addresses are allowed.
    resolver: IP addresses of (host, port), for tests.
    """

    def __init__(self, private: bool = False, resolver: Resolver = resolve) -> None:
        self._over = threading.Event()
        self._backend = _Guarded(private, resolver, self._over)
        self._making = threading.Lock()
        self._made: httpcore.ConnectionPool | None = None

    @property
    def _pool(self) -> httpcore.ConnectionPool:
        """Made when it is first needed, since it reads all certificates of the system."""
        with self._making:
            if self._made is None:
                self._made = httpcore.ConnectionPool(
                    ssl_context=ssl.create_default_context(),
                    network_backend=self._backend,
                    max_keepalive_connections=0,
                    retries=0,
                )
            return self._made

    def interrupt(self) -> None:
        """End the requests that run, and all later ones."""
        self._over.set()

    def close(self) -> None:
        self.interrupt()
        if self._made is not None:
            self._made.close()

    def fetch(self, url: str, target: Path, most_bytes: int, seconds: float) -> int:
        """Write what `url` holds to `target`, following a few redirects; returns its bytes.

        Raises AddressError.
        """
        ends = time.monotonic() + seconds
        _ends.set(ends)
        for _ in range(MOST_REDIRECTS + 1):
            try:
                with self._pool.stream(
                    "GET", checked_url(url), headers={"Accept": "*/*"}, extensions=_timeouts(seconds)
                ) as found:
                    if found.status in _REDIRECTS:
                        headers = {name.lower(): value for name, value in found.headers}
                        url = urljoin(url, headers.get(b"location", b"").decode("latin-1"))
                        continue
                    if found.status != 200:
                        raise AddressError(f"answered with status {found.status}; check the URL")
                    return _save(found.iter_stream(), target, most_bytes, ends)
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError):
                raise AddressError("could not be downloaded; check the URL, or upload the file") from None
        raise AddressError(f"redirects more than {MOST_REDIRECTS} times; give the final URL")

    def post(self, url: str, body: bytes, headers: dict[bytes | str, bytes | str], seconds: float) -> None:
        """Post `body`; a redirect is not followed. Raises DeliveryError unless the status is 2xx."""
        _ends.set(time.monotonic() + seconds)
        try:
            with self._pool.stream(
                "POST", checked_url(url), headers=headers, content=body, extensions=_timeouts(seconds)
            ) as found:
                status = found.status
        except AddressError as error:
            raise DeliveryError(str(error)) from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise DeliveryError(f"no answer ({type(error).__name__})") from None
        if not 200 <= status < 300:
            raise DeliveryError(f"status {status}")


def _timeouts(seconds: float) -> dict[str, Any]:
    step = min(10.0, seconds)
    return {"timeout": {"connect": step, "read": step, "write": step, "pool": step}}


def _save(blocks: Iterable[bytes], target: Path, most_bytes: int, ends: float) -> int:
    size = 0
    with target.open("wb") as file:
        for block in blocks:
            size += len(block)
            if size > most_bytes:
                raise AddressError(f"has more than {most_bytes} bytes; give a smaller file")
            if time.monotonic() > ends:
                raise AddressError("takes too long to download; upload the file")
            file.write(block)
    return size
