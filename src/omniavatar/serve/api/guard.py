"""The outermost layer of the API: request ids, allowed hosts and origins, bytes counted while they arrive.

It also answers what no handler of the app answers. Starlette would answer it outside of this layer, without
the request's id, and close the connection although the client may use it again.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omniavatar.serve.api.errors import SERVER, ApiError, as_api_error, reply
from omniavatar.serve.api.metrics import Metrics
from omniavatar.serve.jobs.logs import request_id
from omniavatar.serve.settings import ServeSettings

_log = logging.getLogger(__name__)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(:\d{1,5})?")
_OPEN = frozenset(("/health", "/ready", "/metrics"))
_QUIET = {"x-content-type-options": "nosniff", "cache-control": "no-store", "referrer-policy": "no-referrer"}


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = f"req_{uuid.uuid4().hex}"
        token = request_id.set(id)
        state: dict[str, Any] = scope.setdefault("state", {})
        began, status, counted = time.monotonic(), 0, 0
        ends = began + self._settings.upload_seconds
        done = False

        async def counting() -> Message:
            nonlocal counted, done
            if done:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, ends - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "upload_timeout", "the body arrives too slowly; send it again") from None
            size = len(message.get("body", b""))
            counted += size
            self._arriving += size
            done = not message.get("more_body", False)
            if counted > self._settings.upload_bytes:
                most = self._settings.upload_bytes
                raise ApiError(413, "too_large", f"the body has more than {most} bytes; send smaller files")
            if self._arriving > self._settings.uploads_bytes:
                message_ = "too many uploads arrive at the same time; try again later"
                raise ApiError(503, "busy", message_, type=SERVER, headers={"Retry-After": "10"})
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                for name, value in _QUIET.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            problem = self._problem(scope)
            if problem is not None:
                state["error_code"] = problem.code
                await reply(problem)(scope, receive, sending)
            else:
                await self._app(scope, counting, sending)
        except ClientDisconnect:
            state["error_code"] = "client_left"
        except Exception as error:
            if status:  # a part of the reply was sent
                raise
            found = as_api_error(error)
            state["error_code"] = found.code
            await reply(found)(scope, receive, sending)
        finally:
            self._arriving -= counted
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - began
            self._metrics.request(scope["method"], route, status, seconds, state.get("error_code"))
            values = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 4),
                "bytes": counted,
            }
            level = logging.DEBUG if scope["path"] in _OPEN else logging.INFO
            _log.log(level, "request", extra={"values": values})
            request_id.reset(token)

    def _problem(self, scope: Scope) -> ApiError | None:
        """Why a request is refused by its headers alone."""
        headers, settings = Headers(scope=scope), self._settings
        hosts = headers.getlist("host")
        found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if found is None:
            return ApiError(400, "invalid_host", "the Host header is missing or not valid; send one")
        name = found[1].lower()
        checked = settings.is_loopback or settings.allowed_hosts
        own = {"localhost", "127.0.0.1", "[::1]", settings.host.lower(), f"[{settings.host.lower()}]"}
        if checked and "*" not in settings.allowed_hosts and name not in {*own, *settings.allowed_hosts}:
            message = "this server does not answer to this Host name; set allowed_hosts, or use its address"
            return ApiError(421, "unknown_host", message)
        origin = headers.get("origin")
        same = {f"http://{hosts[0]}".lower(), f"https://{hosts[0]}".lower()}
        if origin is not None and origin.lower() not in same and origin not in settings.cors_origins:
            message = "pages of other origins may not use this server; set cors_origins to allow one"
            return ApiError(403, "origin_not_allowed", message, type="permission_error")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > settings.upload_bytes:
            most = settings.upload_bytes
            return ApiError(413, "too_large", f"the body has more than {most} bytes; send smaller files")
        return None
