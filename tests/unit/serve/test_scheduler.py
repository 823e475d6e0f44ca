"""The rules of the batch queue, with simulated workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from batch_stub import make_items
from omniavatar.engine.events import Message
from omniavatar.errors import CheckpointError, OutputError, ResourceError
from omniavatar.serve.batch.crew import Answered, CrewLost, Lost, News, Started
from omniavatar.serve.batch.events import WorkerLost
from omniavatar.serve.batch.items import Item, Made, Outcome, Progress, Task, Verdict, WorkerInfo
from omniavatar.serve.batch.ledger import Ledger
from omniavatar.serve.batch.report import summary
from omniavatar.serve.batch.rules import Rules
from omniavatar.serve.batch.run_folder import ItemState, RunFolder
from omniavatar.serve.batch.scheduler import MOST_CREWS, Scheduler
from omniavatar.types import Event

INFO = WorkerInfo("host", 1, "simulated", "")
DONE = Outcome(Verdict.done, 0.0, 1.0, Made(4, 4, 0, 2.0), 10)
Answer = Callable[[int, Task], Outcome | Lost]


def failure(verdict: Verdict, error: str = "x: is wrong; mend it", kind: str = "InputError") -> Outcome:
    return Outcome(verdict, 0.0, 0.5, error=error, error_class=kind, replace=verdict is Verdict.broken)


@dataclass
class SimulatedCrew:
    """Answers at once with the result of `answer`; its clock advances when the scheduler waits."""

    answer: Answer = lambda slot, task: DONE
    workers: int = 2
    start: Callable[[int], News] = lambda slot: Started(slot, INFO)
    now: float = 0.0
    given: list[tuple[int, str, bool, float]] = field(default_factory=list)
    news: deque[News] = field(default_factory=deque)
    dismissed: list[int] = field(default_factory=list)
    closed: bool = False
    working: dict[int, str] = field(default_factory=dict)

    def hire(self, slot: int) -> None:
        self.news.append(self.start(slot))

    def give(self, slot: int, task: Task) -> None:
        assert slot not in self.working, "one item at a time"
        assert task.item.key not in self.working.values(), "one worker an item"
        self.working[slot] = task.item.key
        self.given.append((slot, task.item.key, task.fresh, self.now))
        answer = self.answer(slot, task)
        self.news.append(Answered(slot, answer) if isinstance(answer, Outcome) else answer)

    def dismiss(self, slot: int) -> None:
        self.working.pop(slot, None)
        self.dismissed.append(slot)

    def wait(self, seconds: float) -> Sequence[News]:
        if not self.news:
            self.now += max(seconds, 0.01)
            return []
        news = self.news.popleft()
        if isinstance(news, Answered):
            self.working.pop(news.slot)
        return [news]

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        return {}

    def close(self) -> None:
        self.closed = True

    def keys(self) -> list[str]:
        return [key for _, key, _, _ in self.given]


def run(
    crew: SimulatedCrew,
    items: Sequence[Item],
    folder: Path,
    before: Mapping[str, ItemState] | None = None,
    sizes: Mapping[str, int] | None = None,
    event: Any = None,
    run_folder: RunFolder | None = None,
    **rules: Any,
) -> Ledger:
    run_folder = run_folder or RunFolder(folder)
    with run_folder.own():
        scheduler = Scheduler(
            lambda: crew, run_folder, Rules(**rules), event or (lambda event: None), lambda: crew.now
        )
        return scheduler.run(items, run_folder.states() if before is None else before, sizes or {})


def names(ledger: Ledger) -> dict[str, str]:
    return {key: state.state for key, state in ledger.states.items()}


def test_items_go_in_order_to_idle_workers(tmp_path: Path) -> None:
    crew = SimulatedCrew()
    ledger = run(crew, make_items(["a", "b", "c", "d", "e"]), tmp_path)
    assert crew.keys() == [f"0000{i}" for i in range(5)] and crew.closed
    assert set(names(ledger).values()) == {"done"}
    assert RunFolder(tmp_path).states() == {
        key: replace(state, updated=RunFolder(tmp_path).states()[key].updated)
        for key, state in ledger.states.items()
    }
    figures = summary(ledger)
    assert figures["done"] == 5 and figures["video_seconds"] == 10.0
    assert sum(row["busy_seconds"] for row in figures["workers"]) == 5.0


def test_no_more_workers_than_items(tmp_path: Path) -> None:
    assert len(run(SimulatedCrew(workers=8), make_items(["a", "b"]), tmp_path).slots) == 2


def test_without_open_items_no_worker_starts(tmp_path: Path) -> None:
    items = make_items(["a"])
    run(SimulatedCrew(), items, tmp_path)

    def open_crew() -> SimulatedCrew:
        raise AssertionError("a worker was started")

    folder = RunFolder(tmp_path)
    scheduler = Scheduler(open_crew, folder, Rules(), lambda event: None)
    ledger = scheduler.run(items, folder.states(), {"00000.mp4": 10})
    assert ledger.skipped == {"00000"}


def test_done_item_is_made_again_if_it_changed_or_is_missing(tmp_path: Path) -> None:
    items = make_items(["a", "b", "c"])
    sizes = {item.name: 10 for item in items}
    run(SimulatedCrew(), items, tmp_path)
    crew = SimulatedCrew()
    run(crew, make_items(["a", "other", "c"]), tmp_path, sizes={**sizes, "00002.mp4": 9})
    assert crew.keys() == ["00001", "00002"]
    crew = SimulatedCrew()
    run(crew, items, tmp_path, sizes=sizes, fresh=True)
    assert [(key, fresh) for _, key, fresh, _ in crew.given] == [(item.key, True) for item in items]


def test_damaged_state_counts_as_none(tmp_path: Path) -> None:
    items = make_items(["a", "b"])
    run(SimulatedCrew(), items, tmp_path)
    (tmp_path / "items" / "00000.json").write_text('{"format": 1, "key"')
    (tmp_path / "items" / "stranger.json").write_text("[]")
    crew = SimulatedCrew()
    run(crew, items, tmp_path, sizes={item.name: 10 for item in items})
    assert crew.keys() == ["00000"]


def test_bad_line_fails_without_a_worker(tmp_path: Path) -> None:
    bad = replace(make_items(["a"])[0], request=None, problem="in.txt:1: no image")
    ledger = run(SimulatedCrew(), [bad, make_items(["x", "b"])[1]], tmp_path)
    assert names(ledger) == {"00000": "failed", "00001": "done"}
    assert summary(ledger)["failures"][0]["error"] == "in.txt:1: no image"


@pytest.mark.parametrize(
    ("verdict", "attempts"), [(Verdict.failed, 1), (Verdict.retry, 3), (Verdict.broken, 3)]
)
def test_attempts(tmp_path: Path, verdict: Verdict, attempts: int) -> None:
    crew = SimulatedCrew(lambda slot, task: failure(verdict) if task.item.key == "00000" else DONE)
    ledger = run(crew, make_items(["a", "b"]), tmp_path, retries=2, retry_wait_s=3.0)
    assert names(ledger) == {"00000": "failed", "00001": "done"}
    assert crew.keys().count("00000") == attempts == ledger.states["00000"].attempts
    at = [when for _, key, _, when in crew.given if key == "00000"]
    pauses = [later - earlier for earlier, later in pairwise(at)]
    assert all(3.0 * 2**i <= pause < 3.0 * 2**i + 1.1 for i, pause in enumerate(pauses))
    assert crew.dismissed.count(crew.given[0][0]) == (1 + attempts if verdict is Verdict.broken else 1)


def test_worker_is_replaced_if_its_answer_requests_it(tmp_path: Path) -> None:
    spent = replace(failure(Verdict.failed), replace=True)
    crew = SimulatedCrew(lambda slot, task: spent if task.item.key == "00000" else DONE, workers=1)
    ledger = run(crew, make_items(["a", "b"]), tmp_path)
    assert names(ledger) == {"00000": "failed", "00001": "done"}
    assert ledger.slots[0].starts == 2 and ledger.slots[0].lost == 0


def test_item_of_a_dead_worker_goes_to_the_front_and_is_not_started_over(tmp_path: Path) -> None:
    deaths = iter([True])

    def answer(slot: int, task: Task) -> Outcome | Lost:
        return Lost(slot, "killed") if task.item.key == "00001" and next(deaths, False) else DONE

    crew = SimulatedCrew(answer, workers=1)
    ledger = run(crew, make_items(["a", "b", "c"]), tmp_path, fresh=True)
    assert crew.keys() == ["00000", "00001", "00001", "00002"]
    assert [fresh for _, _, fresh, _ in crew.given] == [True, True, False, True]
    assert ledger.slots[0].starts == 2 and ledger.slots[0].lost == 1


def test_item_that_kills_every_worker_fails_alone(tmp_path: Path) -> None:
    def answer(slot: int, task: Task) -> Outcome | Lost:
        return Lost(slot, "killed") if task.item.key == "00001" else DONE

    ledger = run(SimulatedCrew(answer), make_items(["a", "b", "c"]), tmp_path, retries=1)
    assert names(ledger) == {"00000": "done", "00001": "failed", "00002": "done"}
    assert ledger.states["00001"].error == "its worker died: killed"


def test_item_of_another_process_waits_without_using_attempts(tmp_path: Path) -> None:
    busy = iter([True] * 5)

    def answer(slot: int, task: Task) -> Outcome | Lost:
        return failure(Verdict.busy) if task.item.key == "00000" and next(busy, False) else DONE

    crew = SimulatedCrew(answer)
    events: list[str] = []
    ledger = run(
        crew,
        make_items(["a", "b"]),
        tmp_path,
        retries=0,
        busy_wait_s=5.0,
        event=lambda event: events.append(event.kind),
    )
    assert set(names(ledger).values()) == {"done"}
    assert ledger.states["00000"].attempts == 1
    assert events.count("item_waiting") == 1 and crew.now >= 25


def test_an_error_that_hits_every_item_ends_the_batch(tmp_path: Path) -> None:
    crew = SimulatedCrew(
        lambda slot, task: failure(Verdict.fatal, "w.pt: gone", "CheckpointError"), workers=1
    )
    ledger = run(crew, make_items(["a", "b"]), tmp_path)
    assert isinstance(ledger.error, CheckpointError) and str(ledger.error) == "w.pt: gone"
    assert names(ledger) == {"00000": "failed", "00001": "queued"} and crew.closed


def test_one_worker_that_cannot_start_leaves_the_work_to_the_others(tmp_path: Path) -> None:
    trouble = failure(Verdict.retry, "device: no memory", "ResourceError")
    crew = SimulatedCrew(start=lambda slot: Started(slot, trouble if slot == 0 else INFO))
    ledger = run(crew, make_items(["a", "b"]), tmp_path)
    assert set(names(ledger).values()) == {"done"} and ledger.slots[0].closed == "device: no memory"
    failing = SimulatedCrew(start=lambda slot: Started(slot, trouble))
    ledger = run(failing, make_items(["c", "d"]), tmp_path / "other")
    assert isinstance(ledger.error, ResourceError) and str(ledger.error) == "device: no memory"


def test_slots_whose_workers_die_at_their_start_are_closed(tmp_path: Path) -> None:
    crew = SimulatedCrew(start=lambda slot: Lost(slot, "died\nat start"))
    ledger = run(crew, make_items(["a", "b"]), tmp_path)
    assert (
        isinstance(ledger.error, ResourceError)
        and str(ledger.error) == "every worker failed to start: at start"
    )
    assert [slot.starts for slot in ledger.slots] == [3, 3]
    assert set(names(ledger).values()) == {"queued"}


def test_cluster_that_never_gives_a_worker(tmp_path: Path) -> None:
    crew = SimulatedCrew()
    crew.hire = lambda slot: None  # type: ignore[method-assign]
    ledger = run(crew, make_items(["a"]), tmp_path, start_limit_s=60.0)
    assert isinstance(ledger.error, ResourceError) and "within" in str(ledger.error)
    assert 60 <= crew.now < 70


def test_full_disk_ends_the_batch_before_every_item_fails(tmp_path: Path) -> None:
    full = failure(Verdict.retry, "cannot write: the disk is full; free some space", "OutputError")
    crew = SimulatedCrew(lambda slot, task: full)
    ledger = run(crew, make_items([f"p{i}" for i in range(50)]), tmp_path)
    assert isinstance(ledger.error, OutputError) and "disk is full" in str(ledger.error)
    assert len(set(crew.keys())) < 10
    one = SimulatedCrew(lambda slot, task: full if task.item.key == "00003" else DONE)
    ledger = run(one, make_items([f"p{i}" for i in range(20)]), tmp_path / "other", retries=9)
    assert ledger.error is None and sum(s == "done" for s in names(ledger).values()) == 19


def test_states_that_cannot_be_written_cost_a_warning(tmp_path: Path) -> None:
    class FullFolder(RunFolder):
        def write(self, state: ItemState) -> None:
            raise OutputError("cannot write x: the disk is full; free some space")

    events: list[str] = []
    ledger = run(
        SimulatedCrew(),
        make_items(["a", "b"]),
        tmp_path,
        run_folder=FullFolder(tmp_path),
        event=lambda event: isinstance(event, Message) and events.append(event.text),
    )
    assert set(names(ledger).values()) == {"done"}
    assert len(events) == 1 and "disk is full" in events[0]


def test_ctrl_c_leaves_running_items_queued(tmp_path: Path) -> None:
    def answer(slot: int, task: Task) -> Outcome | Lost:
        if task.item.key == "00002":
            raise KeyboardInterrupt
        return DONE

    crew = SimulatedCrew(answer, workers=1)
    ledger = run(crew, make_items(["a", "b", "c", "d"]), tmp_path)
    assert ledger.interrupted and crew.closed
    assert list(names(ledger).values()) == ["done", "done", "queued", "queued"]
    assert RunFolder(tmp_path).states()["00002"].state == "queued"


def test_the_drivers_own_work_for_an_item_does_not_grow_with_the_queue(tmp_path: Path) -> None:
    def seconds_an_item(count: int) -> float:
        items = make_items([f"p{i}" for i in range(count)])
        started = time.process_time()
        ledger = run(SimulatedCrew(workers=8), items, tmp_path / str(count))
        spent = time.process_time() - started
        assert sum(state.state == "done" for state in ledger.states.values()) == count
        return spent / count

    seconds_an_item(200)
    short, long = seconds_an_item(500), seconds_an_item(4000)
    assert long < 2 * short + 0.0005
    assert long < 0.005


class DyingCrew(SimulatedCrew):
    """Is lost at its wait number `deaths`."""

    def __init__(self, death: int) -> None:
        super().__init__()
        self.waits, self.death = 0, death

    def wait(self, seconds: float) -> Sequence[News]:
        self.waits += 1
        if self.waits == self.death:
            raise CrewLost("the service ended")
        return super().wait(seconds)


def with_crews(crews: list[DyingCrew], folder: Path, items: Sequence[Item]) -> tuple[Ledger, list[Event]]:
    left, events = iter(crews), list[Event]()
    run_folder = RunFolder(folder)
    with run_folder.own():
        scheduler = Scheduler(lambda: next(left), run_folder, Rules(), events.append, lambda: crews[0].now)
        return scheduler.run(items, {}, {}), events


@pytest.mark.parametrize("death", range(1, 6))
def test_a_lost_crew_costs_no_item_an_attempt(tmp_path: Path, death: int) -> None:
    crews = [DyingCrew(death), DyingCrew(-1)]
    ledger, events = with_crews(crews, tmp_path, make_items(["a", "b", "c"]))
    assert set(names(ledger).values()) == {"done"} and all(crew.closed for crew in crews)
    assert {state.attempts for state in ledger.states.values()} == {1}
    said = [event for event in events if isinstance(event, Message)]
    assert [event.text for event in said] == [
        "the service ended; starting it again, finished windows are kept"
    ]
    assert not any(isinstance(event, WorkerLost) for event in events)


def test_a_crew_that_is_lost_again_and_again_ends_the_batch(tmp_path: Path) -> None:
    crews = [DyingCrew(1) for _ in range(MOST_CREWS + 1)]
    ledger, _ = with_crews(crews, tmp_path, make_items(["a"]))
    assert isinstance(ledger.error, ResourceError) and "as 3 times before" in str(ledger.error)
    assert [crew.closed for crew in crews] == [True] * MOST_CREWS + [False]
    assert names(ledger) == {"00000": "queued"}
