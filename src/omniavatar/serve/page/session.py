"""The page's own key, for a server that has API keys: opened once by its address, then held in a cookie.

Players, event streams and downloads of a browser cannot send an Authorization header. A cookie that no script
can read and no other site can use stands in for it.
"""

from __future__ import annotations

import os
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from omniavatar.media.atomic import translate_os_error
from omniavatar.serve.api.access import READ, WRITE
from omniavatar.serve.jobs.keys import KeyStore

KEY_NAME = "page"
KEY_FILE = "page.key"
COOKIE = "omniavatar_page"
PARAMETER = "key"


def page_key(keys: KeyStore, folder: Path) -> str | None:
    """The page's key if the server has keys; it stays the same over restarts. None without keys.

    folder: where its file lies, readable for this user only.

    Raises StoreError, OutputError.
    """
    found = keys.list()
    if not found:
        return None
    path = folder / KEY_FILE
    with translate_os_error(path):
        if path.is_file() and keys.verify(token := path.read_text("ascii", "replace").strip()) is not None:
            return token
        known = any(key.name == KEY_NAME and key.revoked_at is None for key in found)
        token = keys.rotate(KEY_NAME) if known else keys.add(_free_name(keys), [READ, WRITE])
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
    return token


def _free_name(keys: KeyStore) -> str:
    """A revoked key keeps its name."""
    taken = {key.name for key in keys.list()}
    names = (KEY_NAME, *(f"{KEY_NAME}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


class KeyCookie:
    """ASGI middleware: the cookie of a request becomes its Authorization header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            token = cookie_of(headers.get("cookie", ""))
            if token is not None and "authorization" not in headers:
                scope = {**scope, "headers": list(scope["headers"])}
                MutableHeaders(scope=scope)["authorization"] = f"Bearer {token}"
        await self._app(scope, receive, send)


def cookie_of(header: str) -> str | None:
    """The page's key in a Cookie header."""
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return None
    return None if found is None else found.value
