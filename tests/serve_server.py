"""The app of `serve_api` on a real port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from serve_api import Server


@contextmanager
def listening(server: Server) -> Iterator[str]:
    """The address of a real server with a worker that finishes every job."""
    web = uvicorn.Server(uvicorn.Config(server.app, port=0, log_config=None))
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.05):
            claim = server.store.claim("stub", ["pocket"], 60.0)
            if claim is not None:
                server.finish(claim)

    threads = [threading.Thread(target=web.run), threading.Thread(target=work)]
    for thread in threads:
        thread.start()
    try:
        while not web.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    finally:
        web.should_exit = True
        over.set()
        for thread in threads:
            thread.join(20)
