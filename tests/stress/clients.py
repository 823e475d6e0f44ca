"""Many clients at the same time, while workers and the server are killed.

Every client has one video in the server at any time: it creates one, polls as `openai-poll-after-ms` says,
downloads it, and creates the next at once. So the rate of new videos is what the stub engine makes, and the
queue is always as long as there are clients. The clients arrive one after another in the first seconds.
A request that gets no answer, since the server was killed, is sent again; for a new video with the same
`Idempotency-Key`. The time of accepting is that of each answered `POST`, as the client sees it.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from job_stub import noted
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings
from postgres import PostgresServer
from serve_api import portrait, voice
from stress.programs import Served, lines, wait_until_up, working

AFTER_S = 10.0
RAMP_S, PATIENCE_S, HOST_EVERY = 30.0, 300.0, 12
"""Seconds in which the clients arrive; seconds for the last videos to end; each 12th kill is of the host."""


@dataclass(frozen=True)
class Took:
    """When a request began, by the monotonic clock, and how long its answer took."""

    began: float
    seconds: float


@dataclass
class Seen:
    """What the clients saw of each answered request. ends: last status by job."""

    posts: list[Took] = field(default_factory=list)
    polls: list[Took] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    refused: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    wrong_files: int = 0


class Client:
    """One client on a connection of its own."""

    def __init__(self, http: httpx.AsyncClient, body: httpx.Request, video: bytes, seen: Seen) -> None:
        self._http, self._body, self._video, self._seen = http, body, video, seen

    async def run(self, starts: float, ends: float) -> None:
        await asyncio.sleep(max(0.0, starts - time.monotonic()))
        while time.monotonic() < ends:
            key = f"{random.getrandbits(96):x}"
            headers = {"Idempotency-Key": key, "Content-Type": self._body.headers["Content-Type"]}
            reply = await self._answer("POST", "/v1/videos", self._seen.posts, self._body.content, headers)
            if reply.status_code != 200:  # such as while the database is away
                self._seen.refused[reply.status_code] += 1
                await asyncio.sleep(float(reply.headers.get("retry-after", "1")))
                continue
            id = reply.json()["id"]
            self._seen.accepted.append(id)
            await self._follow(id, reply, ends + PATIENCE_S)

    async def _follow(self, id: str, reply: httpx.Response, ends: float) -> None:
        while time.monotonic() < ends:
            await asyncio.sleep(int(reply.headers.get("openai-poll-after-ms", "1000")) / 1000)
            reply = await self._answer("GET", f"/v1/videos/{id}", self._seen.polls)
            if reply.status_code == 503:
                continue
            status = reply.json()["status"] if reply.status_code == 200 else f"status {reply.status_code}"
            if status not in ("queued", "in_progress"):
                self._seen.ends[id] = status
                if status == "completed":
                    content = await self._answer("GET", f"/v1/videos/{id}/content", [])
                    self._seen.wrong_files += content.content != self._video
                return

    async def _answer(self, method: str, path: str, took: list[Took], *body: Any) -> httpx.Response:
        """The answer, however often the request must be sent."""
        content, headers = body or (None, None)
        while True:
            began = time.monotonic()
            try:
                reply = await self._http.request(method, path, content=content, headers=headers)
            except httpx.TransportError:
                self._seen.unanswered += 1
                await asyncio.sleep(random.uniform(0.5, 1.5))
                continue
            took.append(Took(began, time.monotonic() - began))
            return reply


async def kills(
    all: Served, ends: float, seconds: float, every: float, postgres: PostgresServer | None
) -> tuple[Counter[str], list[tuple[float, float]]]:
    """Kill a worker every few seconds, sometimes all with their host; twice the server or its database."""
    done: Counter[str] = Counter()
    restarts: list[tuple[float, float]] = []
    twice = [ends - seconds * 2 / 3, ends - seconds / 3]
    while time.monotonic() < ends:
        await asyncio.sleep(every)
        done["workers"] += 1
        if done["workers"] % HOST_EVERY == 0:
            await asyncio.to_thread(all.workers.kill_and_start)
            done["hosts"] += 1
        elif found := await asyncio.to_thread(all.workers.workers):
            random.choice(found).kill()
        if twice and time.monotonic() > twice[0]:
            twice.pop(0)
            down = time.monotonic()
            if postgres:
                await asyncio.to_thread(postgres.kill)
                await asyncio.to_thread(postgres.start)
                done["database"] += 1
            else:
                await asyncio.to_thread(all.server.kill_and_start)
                await asyncio.to_thread(wait_until_up, all.address)
                done["server"] += 1
            restarts.append((down, time.monotonic()))
    return done, restarts


def share(took: list[Took], part: float) -> float | None:
    """The seconds that this part of the requests does not exceed."""
    values = sorted(each.seconds for each in took)
    return round(values[min(len(values) - 1, int(len(values) * part))], 4) if values else None


def slow(took: list[Took], seconds: float, restarts: list[tuple[float, float]]) -> dict[str, int]:
    """How many requests took so long, and how many of them began around a restart (killed, up again)."""
    found = [each for each in took if each.seconds >= seconds]
    near = [each for each in found if any(down <= each.began < up + AFTER_S for down, up in restarts)]
    return {"all": len(found), "around_restarts": len(near)}


async def clients(
    count: int, seconds: float, kill_every: float, workers: int, postgres: PostgresServer | None = None
) -> dict[str, Any]:
    """postgres: holds the queue instead of SQLite, and is killed instead of the server."""
    seen = Seen()
    database = postgres.empty_database() if postgres else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with working(folder, workers, database=database) as all:
            files = {"input_reference": portrait(), "audio_reference": voice()}
            body = httpx.Request("POST", all.address, data={"prompt": "x"}, files=files)
            body.read()
            limits = httpx.Limits(max_connections=count, keepalive_expiry=3.0)
            async with httpx.AsyncClient(base_url=all.address, timeout=60, limits=limits) as http:
                began = time.monotonic()
                ends, ramp = began + seconds, min(RAMP_S, seconds / 3)
                video, starts = (
                    all.made.read_bytes(),
                    [began + ramp * number / count for number in range(count)],
                )
                runs = [Client(http, body, video, seen).run(start, ends) for start in starts]
                killing = kills(all, ends, seconds, kill_every, postgres)
                (killed, restarts), *_ = await asyncio.gather(killing, *runs)
                wall = time.monotonic() - began
            wait_until_up(all.address)
            all.server.count_cpu()
            all.workers.count_cpu()
            cpu = {"server": round(all.server.cpu_s, 1), "workers": round(all.workers.cpu_s, 1)}
            cpu["clients"] = round(time.process_time(), 1)
        problems = check(folder, database, seen)
        bugs = lines(folder / "server.log", "a bug in this server")
    return {
        "clients": count,
        "database": "postgresql" if postgres else "sqlite",
        "kills": dict(killed),
        "accepted": len(seen.accepted),
        "ended": dict(Counter(seen.ends.values())),
        "refused": dict(seen.refused),
        "unanswered": seen.unanswered,
        "wrong_files": seen.wrong_files,
        **problems,
        "server_bugs": bugs,
        "accept_p50_s": share(seen.posts, 0.5),
        "accept_p99_s": share(seen.posts, 0.99),
        "accept_max_s": share(seen.posts, 1.0),
        "accepts_of_0.2_s": slow(seen.posts, 0.2, restarts),
        "poll_p99_s": share(seen.polls, 0.99),
        "wall_s": round(wall, 1),
        "cpu_s": cpu,
        "broken": bool(
            any(problems.values())
            or bugs
            or seen.wrong_files
            or set(seen.ends.values()) != {"completed"}
            or len(seen.ends) != len(seen.accepted)
        ),
    }


def check(folder: Path, database: str, seen: Seen) -> dict[str, int]:
    """What the database and the engines' notes say about the accepted jobs; all zero if all is well."""
    twice = lost = 0
    with JobStore.open(ServeSettings(data_dir=folder, database=database).database_url) as store:
        for id in seen.accepted:
            statuses = [each.data.get("status") for each in store.events_after(id, limit=1000)]
            lost += "completed" not in statuses
            twice += statuses.count("completed") > 1
    return {
        "accepted_twice": len(seen.accepted) - len(set(seen.accepted)),
        "lost": lost,
        "completed_twice": twice,
        "made_by_two_at_once": len(noted(folder / "notes", "collision")),
    }
