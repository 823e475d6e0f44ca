"""Many clients at the same time, while workers and the server are killed.

The clients are those of `stress.crowd`. So the rate of new videos is what the stub engine makes, and the
queue is always as long as there are clients. The clients arrive one after another in the first seconds.
The time of accepting is that of each answered `POST`, from the client's send to its answer.
`accept_with_retries` counts from the first of the tries that got no answer since the server was killed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from job_stub import noted
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.settings import ServeSettings
from postgres import PostgresServer
from stress.crowd import Plan, Seen, Took, crowd
from stress.programs import Served, lines, wait_until_up, working

AFTER_S = 10.0
RAMP_S, HOST_EVERY = 30.0, 12
"""Seconds in which the clients arrive; each 12th kill is of the host."""
START_S, PROCESSES = 4.0, 2
"""Time for the processes of the clients to start, and their number."""


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


def share(seconds: list[float], part: float) -> float | None:
    """The seconds that this part of them does not exceed."""
    values = sorted(seconds)
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
    database = postgres.empty_database() if postgres else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with working(folder, workers, database=database) as all:
            began = time.monotonic() + START_S
            ramp = min(RAMP_S, seconds / 3)
            starts = [began + ramp * number / count for number in range(count)]
            plan = Plan(all.address, all.made.read_bytes(), starts, began + seconds)
            killing = kills(all, plan.ends, seconds, kill_every, postgres)
            seen, (killed, restarts) = await asyncio.gather(
                asyncio.to_thread(crowd, plan, PROCESSES), killing
            )
            wall = time.monotonic() - began
            wait_until_up(all.address)
            all.server.count_cpu()
            all.workers.count_cpu()
            cpu = {"server": round(all.server.cpu_s, 1), "workers": round(all.workers.cpu_s, 1)}
            cpu["clients"] = round(seen.cpu_s, 1)
        problems = check(folder, database, seen)
        bugs = lines(folder / "server.log", "a bug in this server")
    posts = [each.seconds for each in seen.posts]
    whole = [each.whole for each in seen.posts]
    return {
        "clients": count,
        "seconds": seconds,
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "database": "postgresql" if postgres else "sqlite",
        "kills": dict(killed),
        "down_s": [round(up - down, 2) for down, up in restarts],
        "accepted": len(seen.accepted),
        "ended": dict(Counter(seen.ends.values())),
        "refused": dict(seen.refused),
        "unanswered": seen.unanswered,
        "wrong_files": seen.wrong_files,
        **problems,
        "server_bugs": bugs,
        "accept_p50_s": share(posts, 0.5),
        "accept_p99_s": share(posts, 0.99),
        "accept_max_s": share(posts, 1.0),
        "accept_with_retries_p99_s": share(whole, 0.99),
        "accept_with_retries_max_s": share(whole, 1.0),
        "accepts_of_0.2_s": slow(seen.posts, 0.2, restarts),
        "poll_p99_s": share([each.seconds for each in seen.polls], 0.99),
        "client_lag_p99_s": share(seen.lags, 0.99),
        "client_lag_max_s": share(seen.lags, 1.0),
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
