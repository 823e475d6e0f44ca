"""Threads for requests with files, apart from those of all others.

A hostile upload may keep its thread as long as a check may take. So uploads have separate threads, and
polls, lists and downloads are answered meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import anyio
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

from omniavatar.serve.api.errors import SERVER, ApiError

THREADS, MOST_WAITING = 16, 512
"""Uploads that are worked on at the same time, and those that wait for a thread."""
_limiter: RunVar[anyio.CapacityLimiter] = RunVar("uploads")

Result = TypeVar("Result")


async def in_turn(work: Callable[..., Result], *arguments: object) -> Result:
    """What `work` returns, from a thread for uploads. Raises ApiError if too many wait."""
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(THREADS)
        _limiter.set(limiter)
    if limiter.statistics().tasks_waiting >= MOST_WAITING:
        message = "too many uploads wait for their check; try again later"
        raise ApiError(503, "busy", message, type=SERVER, headers={"Retry-After": "10"})
    return await run_sync(partial(work, *arguments), limiter=limiter)
