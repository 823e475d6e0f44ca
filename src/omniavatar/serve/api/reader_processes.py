"""How the processes that decode uploads start: forked from one that has imported the readers.

That one imports nothing of the API, and neither does this module, so it can start before the API is imported.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

READERS = ["omniavatar.serve.api.decoding", "omniavatar.media.audio_source"]


def reader_context() -> BaseContext:
    """The start method; `spawn` where the system cannot fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(READERS)
    return context


def begin_readers() -> None:
    """Start the process to fork from now, so that it imports the readers while this one imports the API."""
    if reader_context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()
