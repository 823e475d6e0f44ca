"""Clients of the API while PostgreSQL is killed and started again: what was accepted is there, once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from postgres import PostgresServer, programs
from serve_api import Serve

CLIENTS, AFTER_KILL = 4, 5


@pytest.mark.slow
def test_a_kill_of_postgresql_under_load_loses_no_accepted_job(serve: Serve) -> None:
    folder = programs()
    if folder is None:
        pytest.skip("needs a PostgreSQL server: apt-get install postgresql")
    postgres = PostgresServer(folder)
    try:
        server = serve(database=postgres.empty_database())
        restarted = threading.Event()

        def client(number: int) -> tuple[dict[str, str], int]:
            """The ids of this client's jobs by idempotency key, and how often the database was away."""
            accepted: dict[str, str] = {}
            away, last = 0, None
            for each in count():
                if restarted.is_set() and last is None:
                    last = each + AFTER_KILL
                if each == last:
                    return accepted, away
                key, status = f"{number}-{each}", 503
                while status == 503:
                    reply = server.create(headers={"Idempotency-Key": key})
                    status = reply.status_code
                    away += status == 503
                assert status == 200, reply.text
                accepted[key] = reply.json()["id"]
            raise AssertionError

        with ThreadPoolExecutor(CLIENTS) as pool:
            runs = [pool.submit(client, number) for number in range(CLIENTS)]
            time.sleep(1.0)
            postgres.kill()
            postgres.start()
            restarted.set()
            found = [run.result(120) for run in runs]
        accepted = {key: id for ids, _ in found for key, id in ids.items()}
        assert sum(away for _, away in found) > 0, "no request met the kill"
        jobs = []
        while page := server.store.list(after=jobs[-1].id if jobs else None, limit=100).jobs:
            jobs += page
        assert {job.idempotency_key: job.id for job in jobs} == accepted and len(jobs) == len(accepted)
        for id in accepted.values():
            assert server.files.size(id, "input/portrait") and server.files.size(id, "input/voice")
    finally:
        postgres.stop()
