"""Replies that last as long as a job: server-sent events, and the video while it grows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from omniavatar.serve.api.service import Service
from omniavatar.serve.jobs.errors import JobNotFoundError

POLL_S = 0.5
_BLOCK = 2**18


def server_sent_events(service: Service, id: str, last: int) -> EventSourceResponse:
    """The events after number `last`, as they come, until the job ends. Raises ApiError."""
    service.open_stream()

    async def events() -> AsyncIterator[ServerSentEvent]:
        sequence = last
        try:
            while True:
                try:
                    job = await run_in_threadpool(service.store.get, id)
                except JobNotFoundError:
                    return
                found = await run_in_threadpool(service.store.events_after, id, sequence)
                for event in found:
                    sequence = event.sequence
                    yield ServerSentEvent(json.dumps(dict(event.data)), event=event.kind, id=str(sequence))
                if not found:
                    if service.is_ended(job):
                        return
                    await asyncio.sleep(POLL_S)
        finally:
            service.close_stream()

    return EventSourceResponse(events(), ping=15)


async def growing(service: Service, id: str, path: Path, follow: bool) -> AsyncIterator[bytes]:
    """The bytes of a growing video; with `follow`, until its job ends or its file is begun again."""
    with service.stream():
        file = await run_in_threadpool(path.open, "rb")
        try:
            sent = 0
            while True:
                ended = not follow or await _is_ended(service, id)
                while block := await run_in_threadpool(file.read, _BLOCK):
                    sent += len(block)
                    yield block
                if ended or await run_in_threadpool(_is_shorter, path, sent):
                    return
                await asyncio.sleep(POLL_S)
        finally:
            file.close()


def _is_shorter(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size < size


async def _is_ended(service: Service, id: str) -> bool:
    try:
        return service.is_ended(await run_in_threadpool(service.store.get, id))
    except JobNotFoundError:
        return True
