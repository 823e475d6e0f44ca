"""Clients of the stress, in processes of their own, so that only their own work can delay them.

Every client has one video in the server at any time: it creates one, polls as `openai-poll-after-ms` says,
downloads it, and creates the next at once. A request that gets no answer, since the server was killed, is
sent again; for a new video with the same `Idempotency-Key`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx

from serve_api import portrait, voice

PATIENCE_S = 300.0
"""Time for the last videos to end."""
TIMEOUT_S, KEPT_S = 60.0, 3.0
"""For one answer; how long a client keeps its idle connection (the server keeps it for 5)."""
LAG_S = 0.02


@dataclass(frozen=True)
class Took:
    """When a request began, by the monotonic clock, and how long its answer took.

    whole: from the first of its tries, which got no answer, to the answer.
    """

    began: float
    seconds: float
    whole: float


@dataclass
class Seen:
    """What clients saw of each answered request.

    ends: last status by job.
    lags: how late a timer in the clients' process was. cpu_s: of that process.
    """

    posts: list[Took] = field(default_factory=list)
    polls: list[Took] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    refused: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    wrong_files: int = 0
    lags: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def add(self, other: Seen) -> None:
        self.posts += other.posts
        self.polls += other.polls
        self.accepted += other.accepted
        self.ends |= other.ends
        self.refused += other.refused
        self.unanswered += other.unanswered
        self.wrong_files += other.wrong_files
        self.lags += other.lags
        self.cpu_s += other.cpu_s


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Plan:
    """What the clients of one process do. starts: when each of them begins, by the monotonic clock."""

    address: str
    video: bytes
    starts: Sequence[float]
    ends: float


class Client:
    """One client on a connection of its own. form: the request for a video, encoded once."""

    def __init__(self, http: aiohttp.ClientSession, plan: Plan, form: httpx.Request, seen: Seen) -> None:
        self._http, self._plan, self._form, self._seen = http, plan, form, seen

    async def run(self, starts: float) -> None:
        plan, seen = self._plan, self._seen
        kind = self._form.headers["Content-Type"]
        await asyncio.sleep(max(0.0, starts - time.monotonic()))
        while time.monotonic() < plan.ends:
            headers = {"Idempotency-Key": f"{random.getrandbits(96):x}", "Content-Type": kind}
            answer = await self._answer("POST", "", seen.posts, data=self._form.content, headers=headers)
            if answer.status != 200:  # such as while the database is away
                seen.refused[answer.status] += 1
                await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
                continue
            id = json.loads(answer.body)["id"]
            seen.accepted.append(id)
            await self._follow(id, answer)

    async def _follow(self, id: str, answer: Answer) -> None:
        seen = self._seen
        while time.monotonic() < self._plan.ends + PATIENCE_S:
            await asyncio.sleep(int(answer.headers.get("openai-poll-after-ms", "1000")) / 1000)
            answer = await self._answer("GET", f"/{id}", seen.polls)
            if answer.status == 503:
                continue
            status = json.loads(answer.body)["status"] if answer.status == 200 else f"status {answer.status}"
            if status not in ("queued", "in_progress"):
                seen.ends[id] = status
                if status == "completed":
                    content = await self._answer("GET", f"/{id}/content", [])
                    seen.wrong_files += content.body != self._plan.video
                return

    async def _answer(self, method: str, path: str, took: list[Took], **values: Any) -> Answer:
        """The answer, however often the request must be sent."""
        first = time.monotonic()
        while True:
            began = time.monotonic()
            try:
                url = f"{self._plan.address}/v1/videos{path}"
                async with self._http.request(method, url, **values) as reply:
                    body = await reply.read()
            except (aiohttp.ClientError, TimeoutError):
                self._seen.unanswered += 1
                await asyncio.sleep(random.uniform(0.5, 1.5))
                continue
            ended = time.monotonic()
            took.append(Took(began, ended - began, ended - first))
            return Answer(reply.status, reply.headers, body)


async def _run(plan: Plan) -> Seen:
    seen = Seen()
    files = {"input_reference": portrait(), "audio_reference": voice()}
    form = httpx.Request("POST", plan.address, data={"prompt": "x"}, files=files)
    form.read()
    timeout = aiohttp.ClientTimeout(TIMEOUT_S)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        lagging = group.create_task(_lag(seen))
        runs = []
        for start in plan.starts:
            connector = aiohttp.TCPConnector(limit=1, keepalive_timeout=KEPT_S)
            http = aiohttp.ClientSession(connector=connector, timeout=timeout)
            await stack.enter_async_context(http)
            runs.append(group.create_task(Client(http, plan, form, seen).run(start)))
        await asyncio.wait(runs)
        lagging.cancel()
    seen.cpu_s = time.process_time()
    return seen


async def _lag(seen: Seen) -> None:
    while True:
        began = time.monotonic()
        await asyncio.sleep(LAG_S)
        seen.lags.append(time.monotonic() - began - LAG_S)


def _process(plan: Plan) -> Seen:
    return asyncio.run(_run(plan))


def crowd(plan: Plan, processes: int) -> Seen:
    """What the clients saw, when the last of them has ended; they share `processes`."""
    parts = [Plan(plan.address, plan.video, plan.starts[n::processes], plan.ends) for n in range(processes)]
    seen = Seen()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(_process, parts):
            seen.add(part)
    return seen
