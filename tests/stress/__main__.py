"""Stress of the API on the loopback: `PYTHONPATH=src:tests python -m stress NAME`.

- `uploads --count 10000`: mutated portraits and voices; none may crash the server or cause a server error.
- `clients --clients 500 --seconds 300`: many clients on a stub engine while its workers and the server are
  killed (`stress.clients`); every accepted job must end exactly once, and the p99 of accepting must be below
  `--accept-seconds`.
- `document --examples 200`: Schemathesis over the whole OpenAPI document.

Each ends with exit code 1 if a promise is broken, and prints one JSON line with figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from postgres import PostgresServer, programs
from serve_api import portrait, voice
from stress import hooks
from stress.clients import clients
from stress.programs import lines, served, statuses, working


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with some bytes changed, cut, doubled or inserted."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 2, 8, 64))):
        place = chance.randrange(max(1, len(out)))
        how = chance.randrange(4)
        if how == 0 and out:
            out[min(place, len(out) - 1)] = chance.randrange(256)
        elif how == 1:
            del out[place : place + chance.choice((1, 4, 100))]
        elif how == 2:
            out[place:place] = out[place : place + chance.choice((1, 16, 300))]
        else:
            out[place:place] = chance.randbytes(chance.choice((1, 4, 32)))
    return bytes(out)


def uploads(count: int, seed: int) -> dict[str, Any]:
    chance, statuses = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (address, child):
        with httpx.Client(timeout=120) as client:
            for _ in range(count):
                files = {"input_reference": portrait(), "audio_reference": voice()}
                name = chance.choice(list(files))
                files[name] = mutated(files[name], chance)
                body = client.post(f"{address}/v1/videos/estimate", data={"prompt": "x"}, files=files)
                statuses[body.status_code] = statuses.get(body.status_code, 0) + 1
        alive = child.process.poll() is None
        bugs = lines(Path(folder) / "server.log", "a bug in this server")
    bad = sum(number for status, number in statuses.items() if status >= 500)
    broken = bad > 0 or bugs > 0 or not alive
    return {"uploads": count, "statuses": statuses, "server_errors": bad, "bugs": bugs, "broken": broken}


def document(examples: int, seed: int) -> dict[str, Any]:
    """Schemathesis with ids of finished videos, real files among its own (`stress.hooks`), and workers."""
    with tempfile.TemporaryDirectory() as name, working(Path(name), webhook_secret="s" * 32) as served_at:
        address, folder = served_at.address, Path(name)
        files = {"input_reference": portrait(), "audio_reference": voice()}
        with httpx.Client(timeout=120) as client:
            ids = [
                client.post(f"{address}/v1/videos", data={"prompt": "x"}, files=files).json()["id"]
                for _ in range(30)
            ]
            while client.get(f"{address}/v1/videos/{ids[-1]}").json()["status"] != "completed":
                time.sleep(0.2)
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        command += [f"{address}/openapi.json", "--max-examples", str(examples), "--seed", str(seed)]
        command += ["--checks", "not_a_server_error"]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "SCHEMATHESIS_HOOKS": hooks.__name__}
        environment[hooks.IDS] = ",".join(ids)
        done = subprocess.run(command, cwd=folder, env={**os.environ, **environment})
        alive = served_at.server.process.poll() is None
        bugs = lines(folder / "server.log", "a bug in this server")
        answers = statuses(folder / "server.log")
    broken = done.returncode != 0 or bugs > 0 or not alive
    return {"examples": examples, "statuses": answers, "bugs": bugs, "broken": broken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("uploads", "clients", "document"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kill-every", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--postgres", action="store_true", help="the queue is in PostgreSQL, which is killed")
    parser.add_argument("--accept-seconds", type=float, default=0.2)
    parser.add_argument("--examples", type=int, default=200)
    chosen = parser.parse_args()
    if chosen.name == "uploads":
        found = uploads(chosen.count, chosen.seed)
    elif chosen.name == "document":
        found = document(chosen.examples, chosen.seed)
    else:
        postgres = PostgresServer(programs() or Path("bin")) if chosen.postgres else None
        found = asyncio.run(
            clients(chosen.clients, chosen.seconds, chosen.kill_every, chosen.workers, postgres)
        )
        if postgres is not None:
            postgres.stop()
        slow = found["accept_p99_s"] is None or found["accept_p99_s"] >= chosen.accept_seconds
        found = {**found, "too_slow": slow, "broken": found["broken"] or slow}
    print(json.dumps({"stress": chosen.name, **found}))
    sys.exit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
