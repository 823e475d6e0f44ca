"""A web server for live sessions: a page, and the WebSocket that it and other programs use.

`/` is the page. `/v1/realtime/video` is the WebSocket (`live.messages`). Every session of the server uses one
portrait and one pipeline.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from omniavatar.errors import ResourceError
from omniavatar.live.connection import LiveConnection, MakeSession
from omniavatar.live.limits import Door, ServerLimits
from omniavatar.live.vanished import watching
from omniavatar.text import json_text, one_line

if TYPE_CHECKING:
    import socket

    from starlette.applications import Starlette

    from omniavatar.live.session import LiveSession

PING_S = 1.0
"""Seconds between two pings."""
TRANSPORT_BYTES = 16 * 2**20
"""Longer WebSocket messages end their connection before they are read."""
_LINK = re.compile(r'((?:src|href)="[a-z]+\.(?:js|css))"')
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_POLICY = "default-src 'self'; media-src 'self' blob:; img-src 'self' data:; frame-ancestors 'self'"


def make_app(make: MakeSession, door: Door, limits: ServerLimits) -> Starlette:
    """The server's ASGI application. make: a new session for a prompt; called by threads, one at a time."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    open_sessions, making = 0, Lock()

    def make_alone(prompt: str | None) -> LiveSession:
        with making:
            return make(prompt)

    def page(request: Request, name: str) -> Response:
        if refusal := door.refusal(request.headers, request.query_params):
            return Response(f"{refusal}\n", 403, media_type="text/plain")
        text = resources.files("omniavatar.live.page").joinpath(name).read_text("utf-8")
        if door.token is not None:
            text = with_token(text, door.token)
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
        return Response(text, media_type=_TYPES[name.partition(".")[2]], headers=headers)

    def serve_file(name: str) -> Callable[[Request], Response]:
        def serve(request: Request) -> Response:
            return page(request, name)

        return serve

    async def realtime(socket: WebSocket) -> None:
        nonlocal open_sessions
        refusal = door.refusal(socket.headers, socket.query_params)
        if refusal is None and open_sessions >= limits.sessions:
            refusal = f"server: has {limits.sessions} sessions, the most it takes; try again later"
        await socket.accept()
        if refusal is not None:
            await socket.send_text(json_text({"type": "error", "message": one_line(refusal)}))
            await socket.close(1008)
            return
        open_sessions += 1
        try:
            await LiveConnection(socket, make_alone, limits).run()
        except asyncio.CancelledError:  # the server stops while a session opens; uvicorn would log a bug
            return
        finally:
            open_sessions -= 1
        if socket.client_state.name == "CONNECTED":
            with suppress(WebSocketDisconnect):  # the client was faster
                await socket.close()

    names = {"": "index.html"} | {name: name for name in ("page.js", "microphone.js", "style.css")}
    routes = [Route(f"/{path}", serve_file(name)) for path, name in names.items()]
    return Starlette(routes=[*routes, WebSocketRoute("/v1/realtime/video", realtime)])


def with_token(page: str, token: str) -> str:
    """`page` whose links to its own scripts and styles carry the token, without which they are refused."""
    return _LINK.sub(rf'\1?token={quote(token, safe="")}"', page)


Ready = Callable[[int, Callable[[], None]], None]
"""Called with the port of a server that listens, and a function that stops it."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    port: 0 chooses a free one.

    Raises ResourceError if the address cannot be used.
    """
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise ResourceError(
            f"{host}:{port} cannot be used: {error.strerror}; choose another --host or --port"
        ) from None
    return listening


def websocket_settings(limits: ServerLimits) -> dict[str, Any]:
    """Arguments of `uvicorn.Config` that limit messages, and end connections whose client has gone.

    Empty where uvicorn finds no package for WebSockets.
    """
    from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol

    if AutoWebSocketsProtocol is None:
        return {}
    return {
        "ws": watching(AutoWebSocketsProtocol, limits.gone_s),
        "ws_max_size": TRANSPORT_BYTES,
        "ws_ping_interval": min(PING_S, limits.hung_s),
        "ws_ping_timeout": limits.hung_s,
    }


def serve(app: Starlette, listening: socket.socket, ready: Ready, limits: ServerLimits) -> None:
    """Run the server on a socket of `listen` until it is interrupted, and close the socket."""
    import uvicorn

    config = uvicorn.Config(
        app,
        **websocket_settings(limits),
        log_level="warning",
        timeout_graceful_shutdown=2,
        lifespan="off",
    )
    server = uvicorn.Server(config)

    async def run() -> None:
        serving = asyncio.ensure_future(server.serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready(listening.getsockname()[1], lambda: setattr(server, "should_exit", True))
        await serving

    try:
        asyncio.run(run())
    finally:
        listening.close()
