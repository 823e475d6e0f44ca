"""Long queues: new jobs are refused before their body, and polls are spread."""

from __future__ import annotations

import heapq
import io
from collections import Counter

import pytest

from omniavatar.serve.api.load import FRESH_S, QueueLoad
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.records import JobSpec, new_job_id
from omniavatar.serve.jobs.store import JobStore
from serve_api import FILES, Serve

SPEC = JobSpec("pocket", "a person speaks", "input/portrait", None)


def test_polls_are_spread_over_a_long_queue_that_is_counted_once_a_second(serve: Serve) -> None:
    store, now = serve().store, [0.0]
    load = QueueLoad(store, least_ms=1000, polls_per_second=2, clock=lambda: now[0])
    assert (load.refreshed(), load.poll_after_ms()) == (0, 1000)
    for _ in range(5):
        store.submit("one", SPEC)
    assert (load.refreshed(), load.poll_after_ms()) == (0, 1000)
    now[0] += FRESH_S
    assert load.refreshed() == 5
    assert [load.poll_after_ms() for _ in range(6)] == [1250, 1750, 2250, 2750, 3250, 3750]
    assert load.poll_after_ms() == 1250, "more answers than turns"
    slow = QueueLoad(store, 1000, 1, clock=lambda: now[0])
    for _ in range(120):
        store.submit("one", SPEC)
    assert slow.refreshed() == 125
    assert {slow.poll_after_ms() for _ in range(5)} == {60_000}


@pytest.mark.parametrize("polls_per_second", [5, 50])
def test_clients_that_came_at_the_same_time_come_back_one_after_another(
    serve: Serve, polls_per_second: int
) -> None:
    """After some rounds, no second has many more polls than the others."""
    now, clients = [0.0], 10 * polls_per_second

    class Waiting(JobStore):
        def unfinished(self, key_id: str | None = None) -> int:
            return clients

    load = QueueLoad(serve(store=Waiting).store, 100, polls_per_second, clock=lambda: now[0])
    load.refreshed()
    due = [(0.0, number) for number in range(clients)]
    seconds: Counter[int] = Counter()
    while due[0][0] < 90:
        now[0], number = heapq.heappop(due)
        seconds[int(now[0])] += 1
        heapq.heappush(due, (now[0] + load.poll_after_ms() / 1000, number))
    later = [seconds[second] for second in range(30, 90)]
    assert seconds[0] == clients and max(later) <= 1.5 * polls_per_second
    assert 0.9 * polls_per_second <= sum(later) / len(later) <= 1.1 * polls_per_second


def test_the_header_follows_the_queue(serve: Serve) -> None:
    server = serve(poll_after_ms=10, polls_per_second=1)
    server.store.submit("one", SPEC)
    reply = server.create()
    assert reply.headers["openai-poll-after-ms"] == "500", "the queue held one job when it was counted"
    later = server.client.get(f"/v1/videos/{reply.json()['id']}").headers["openai-poll-after-ms"]
    assert 500 <= int(later) <= 2000, "the next turn; the queue may be counted again"


def test_a_full_queue_refuses_before_it_reads_the_body(serve: Serve) -> None:
    server = serve(queue_length=1)
    server.store.submit("one", SPEC)
    unread = server.client.post("/v1/videos", content=b"{", headers={"Content-Type": "application/json"})
    assert unread.status_code == 503 and unread.json()["error"]["code"] == "queue_full"
    assert unread.headers["retry-after"] and not server.folders


def test_a_repeated_request_finds_its_job_in_a_full_queue(serve: Serve) -> None:
    server = serve(queue_length=1)
    headers = {"Idempotency-Key": "one"}
    id = server.create(headers=headers).json()["id"]
    assert serve(queue_length=1).create(headers=headers).json()["id"] == id
    assert len(server.folders) == 1


class Torn(JobStore):
    """A store that accepts a job, but whose answer is lost."""

    def submit(self, *arguments: object, **values: object) -> object:  # type: ignore[override]
        super().submit(*arguments, **values)  # type: ignore[arg-type]
        raise StoreError("sqlite: the job database does not answer")


def test_a_lost_answer_of_the_database_keeps_the_files_of_the_job(serve: Serve) -> None:
    """The job may be in the queue all the same, and the same idempotency key then finds it whole."""
    server = serve(store=Torn)
    headers = {"Idempotency-Key": "one"}
    assert server.create(headers=headers).status_code == 503
    found = serve().create(headers=headers)
    assert found.status_code == 200
    id = found.json()["id"]
    assert server.files.open(id, "input/portrait").read() == FILES["input_reference"][1]
    assert server.files.open(id, "input/voice").read() == FILES["audio_reference"][1]


@pytest.mark.parametrize("place", ["folder", "url"])
def test_a_draft_is_an_input_once_it_is_sealed(tmp_path, place: str) -> None:
    files = JobFiles(str(tmp_path / "files"))
    if place == "url":
        files = JobFiles(f"file://{tmp_path}/files", tmp_path / "staging")
    files.check()
    id, dropped = new_job_id(), new_job_id()
    (files.draft(id) / "portrait").write_bytes(b"x")
    (files.draft(dropped) / "portrait").write_bytes(b"y")
    files.seal(id)
    files.drop_draft(dropped)
    assert files.open(id, "input/portrait").read() == b"x"
    assert files.size(dropped, "input/portrait") is None
    assert set(files.ids(older_than_s=-1)) == {id}
    files.put(id, "input/more", io.BytesIO(b"z"))
    files.delete(id)
    assert set(files.ids(older_than_s=-1)) == set()
