"""Stress of the API on the loopback: `PYTHONPATH=src:tests python -m stress NAME`.

- `uploads --count 10000`: mutated portraits and voices; none may crash the server or cause a server error.
- `clients --clients 500 --seconds 300`: many clients on a stub engine while its workers and the server are
  killed; every accepted job must end exactly once. Prints the p99 of accepting.
- `document --examples 200`: Schemathesis over the whole OpenAPI document.

Each ends with exit code 1 if a promise is broken, and prints one JSON line with figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from serve_api import portrait, voice

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Child:
    """A process of `stress.stub` that can be killed and started again."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "stress.stub", *self._arguments]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})

    def kill_and_start(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process = self._start()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Child]]:
    port = free_port()
    child = Child("server", str(folder), str(port))
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(address)
        yield address, child
    finally:
        child.end()


def wait_until_up(address: str) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            httpx.get(f"{address}/health")
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("error: the server did not start within 60 s")


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
    bad = sum(number for status, number in statuses.items() if status >= 500)
    return {"uploads": count, "statuses": statuses, "server_errors": bad, "broken": bad > 0 or not alive}


async def clients(count: int, seconds: float, kill_every: float, workers: int) -> dict[str, Any]:
    accepted: dict[str, str] = {}
    took: list[float] = []
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as (address, server):
        crew = [Child("worker", name, str(number)) for number in range(workers)]
        ends = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=count)

        async def client(number: int, http: httpx.AsyncClient) -> None:
            chance = random.Random(number)
            await asyncio.sleep(chance.random() * min(10.0, seconds / 3))
            while time.monotonic() < ends:
                key, began = f"{number}-{chance.getrandbits(64)}", time.monotonic()
                tries = 0
                while True:
                    tries += 1
                    try:
                        reply = await http.post(
                            f"{address}/v1/videos",
                            data={"prompt": "x"},
                            files={"input_reference": portrait(), "audio_reference": voice()},
                            headers={"Idempotency-Key": key},
                        )
                    except httpx.TransportError:  # the server was killed; the same key asks again
                        await asyncio.sleep(0.5)
                        continue
                    break
                if reply.status_code == 200:
                    if tries == 1:
                        took.append(time.monotonic() - began)
                    accepted[key] = reply.json()["id"]
                await asyncio.sleep(min(chance.uniform(20, 60), max(0.0, ends - time.monotonic())))

        async def kills() -> None:
            server_kills = [ends - seconds * 2 / 3, ends - seconds / 3]
            while time.monotonic() < ends:
                await asyncio.sleep(kill_every)
                await asyncio.to_thread(random.choice(crew).kill_and_start)
                if server_kills and time.monotonic() > server_kills[0]:
                    server_kills.pop(0)
                    await asyncio.to_thread(server.kill_and_start)

        try:
            async with httpx.AsyncClient(timeout=60, limits=limits) as http:
                await asyncio.gather(kills(), *(client(number, http) for number in range(count)))
                await asyncio.to_thread(wait_until_up, address)
                statuses: dict[str, int] = {}
                last = time.monotonic() + 300
                waiting = set(accepted.values())
                while waiting and time.monotonic() < last:
                    for id in list(waiting):
                        status = (await http.get(f"{address}/v1/videos/{id}")).json().get("status", "lost")
                        if status not in ("queued", "in_progress"):
                            waiting.discard(id)
                            statuses[status] = statuses.get(status, 0) + 1
                    await asyncio.sleep(1)
        finally:
            for child in crew:
                child.end()
        made = [line for path in Path(name).glob("made-*") for line in path.read_text().split()]
    twice = len(made) - len(set(made))
    took.sort()
    return {
        "clients": count,
        "accepted": len(accepted),
        "ids": len(set(accepted.values())),
        "ended": statuses,
        "unfinished": len(waiting),
        "completed_twice": twice,
        "p50_s": took[len(took) // 2] if took else None,
        "p99_s": took[int(len(took) * 0.99)] if took else None,
        "broken": bool(waiting or twice or set(statuses) - {"completed"} or not accepted),
    }


def document(examples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as (address, _):
        program = Path(sys.executable).with_name("schemathesis")
        command = [str(program), "run", f"{address}/openapi.json", "--max-examples", str(examples)]
        command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"]
        done = subprocess.run(command)
    return {"examples": examples, "broken": done.returncode != 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("uploads", "clients", "document"))
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kill-every", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--examples", type=int, default=200)
    chosen = parser.parse_args()
    if chosen.name == "uploads":
        found = uploads(chosen.count, chosen.seed)
    elif chosen.name == "document":
        found = document(chosen.examples)
    else:
        found = asyncio.run(clients(chosen.clients, chosen.seconds, chosen.kill_every, chosen.workers))
    print(json.dumps({"stress": chosen.name, **found}))
    sys.exit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
