"""The scheduler of a batch: which worker makes which item next, and how failures are handled.

Only an idle worker gets an item, so a long item delays no other. An item whose worker died goes to the front
of the queue, since its finished windows are on disk. This file does not know Ray, torch or processes; the
clock is a parameter.

A worker that waits comes first: after its answer it gets the next item at once, and states are written while
no news arrives.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omniavatar.engine.events import Message
from omniavatar.errors import OmniAvatarError, OutputError, ResourceError
from omniavatar.serve.batch.crew import Answered, Crew, CrewLost, Lost, News, Started
from omniavatar.serve.batch.events import (
    BatchStarted,
    ItemDone,
    ItemFailed,
    ItemRetried,
    ItemStarted,
    ItemWaiting,
    ItemWindow,
    WorkerClosed,
    WorkerLost,
    WorkerReady,
)
from omniavatar.serve.batch.items import (
    WORKER_DIED,
    Item,
    Outcome,
    Task,
    Verdict,
    WorkerInfo,
    as_error,
    last_line,
)
from omniavatar.serve.batch.ledger import Ledger, WorkerSlot
from omniavatar.serve.batch.rules import Rules
from omniavatar.serve.batch.run_folder import ItemState, RunFolder, first_state
from omniavatar.types import Event

Report = Callable[[Event], None]
FALSE_STARTS = 3  # a slot is closed after this many workers in a row died before they were ready
MOST_CREWS = 4  # the batch ends when this number of crews was lost
LONGEST_UNWRITTEN_S = 0.1  # a state is written at least this often, even while news keeps arriving


class Scheduler:
    """Runs the items of one batch."""

    def __init__(
        self,
        open_crew: Callable[[], Crew],
        folder: RunFolder,
        rules: Rules,
        event: Report,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_crew, self._folder, self._rules = open_crew, folder, rules
        self._event, self._clock = event, clock
        self._crew: Crew
        self._crews_lost = 0
        self._queue: deque[Item] = deque()
        self._later: list[tuple[float, int, Item]] = []
        self._put_off = 0
        self._attempts: dict[str, int] = {}
        self._waiting: set[str] = set()
        self._storage_errors: set[str] = set()
        self._unwritten: dict[str, ItemState] = {}
        self._written_at = clock()
        self._warned = False

    def run(self, items: Sequence[Item], before: Mapping[str, ItemState], sizes: Mapping[str, int]) -> Ledger:
        """Make every item that is not done yet; Ctrl-C, or an error that affects every item, ends it early.

        before: states of an earlier run.
        sizes: bytes of the videos at the destination, by name.
        """
        ledger = Ledger({item.key: self._first(item, before.get(item.key), sizes) for item in items})
        for item in items:
            state = ledger.states[item.key].state
            if state == "done":
                ledger.skipped.add(item.key)
            elif state == "queued":
                self._queue.append(item)
        began = self._clock()
        self._event(
            BatchStarted(
                items=len(items),
                queued=len(self._queue),
                skipped=len(ledger.skipped),
                failed=len(items) - len(self._queue) - len(ledger.skipped),
            )
        )
        if self._queue:
            self._work(ledger)
        while self._unwritten:
            self._write_one()
        ledger.wall = self._clock() - began
        return ledger

    def _work(self, ledger: Ledger) -> None:
        try:
            self._crew = self._open()
        except OmniAvatarError as error:
            ledger.error = error
            return
        ledger.slots = [WorkerSlot(number) for number in range(min(self._crew.workers, len(self._queue)))]
        try:
            for slot in ledger.slots:
                self._hire(slot)
            self._loop(ledger)
        except OmniAvatarError as error:
            ledger.error = error
        except KeyboardInterrupt:
            ledger.interrupted = True
        finally:
            for slot in ledger.slots:
                if slot.task is not None:
                    self._save(ledger, slot.task.item, state="queued")
                self._end(slot)
            self._crew.close()

    def _first(self, item: Item, old: ItemState | None, sizes: Mapping[str, int]) -> ItemState:
        """The state of an item at the start of the run; a changed state is marked to be written."""
        same = old is not None and old.identity == item.identity
        state = first_state(item)
        if old is not None and same and not self._rules.fresh:
            if old.state != "done":
                state = replace(state, window=old.window, windows=old.windows)
            elif sizes.get(item.name) == old.bytes:
                return old
        if item.problem is not None:
            state = replace(state, state="failed", error=item.problem, error_class="InputError")
            self._event(ItemFailed(item=item.key, line=item.line, error=item.problem, attempts=0))
        self._unwritten[state.key] = state
        return state

    def _loop(self, ledger: Ledger) -> None:
        started = self._clock()
        next_poll = started
        while self._queue or self._later or any(slot.task is not None for slot in ledger.slots):
            now = self._clock()
            while self._later and self._later[0][0] <= now:
                self._queue.append(heapq.heappop(self._later)[2])
            for slot in ledger.slots:
                if self._queue and slot.info is not None and slot.task is None:
                    self._give(ledger, slot, self._queue.popleft())
            if all(slot.info is None for slot in ledger.slots):
                self._check_start(ledger, now - started)
            else:
                started = now
            until = min([next_poll, *([self._later[0][0]] if self._later else [])])
            try:
                heard = self._crew.wait(0.0 if self._unwritten else max(0.0, until - now))
            except CrewLost as lost:
                self._begin_again(ledger, str(lost))
                continue
            for news in heard:
                self._hear(ledger, news)
            if self._unwritten and (not heard or now - self._written_at > LONGEST_UNWRITTEN_S):
                self._write_one()
            if self._clock() >= next_poll:
                self._poll(ledger)
                next_poll = self._clock() + self._rules.poll_s

    def _check_start(self, ledger: Ledger, waited: float) -> None:
        closed = [slot.closed for slot in ledger.slots if slot.closed]
        if len(closed) == len(ledger.slots):
            raise ResourceError(f"every worker failed to start: {last_line(closed[-1])}")
        if waited > self._rules.start_limit_s:
            raise ResourceError(
                f"no worker started within {waited:.0f} s; use fewer --gpus or --workers, "
                "or run `ray status` to see what the cluster lacks"
            )

    def _hire(self, slot: WorkerSlot) -> None:
        slot.starts += 1
        self._crew.hire(slot.number)

    def _open(self, lost: str = "") -> Crew:
        while True:
            if lost:
                self._crews_lost += 1
                if self._crews_lost == MOST_CREWS:
                    times = f"as {MOST_CREWS - 1} times before"
                    raise ResourceError(f"{lost}, {times}; free memory and give the same command again")
                self._event(Message(f"{lost}; starting it again, finished windows are kept", "warning"))
            try:
                return self._open_crew()
            except CrewLost as error:
                lost = str(error)

    def _begin_again(self, ledger: Ledger, reason: str) -> None:
        """Open another crew. Items in work go to the front of the queue; it was no failure of theirs."""
        for slot in ledger.slots:
            if slot.task is not None:
                item = slot.task.item
                self._attempts[item.key] -= 1
                self._save(ledger, item, state="queued", attempts=self._attempts[item.key])
                self._queue.appendleft(item)
            slot.lost += slot.info is not None
            self._end(slot)
        self._crew.close()
        self._crew = self._open(reason)
        for slot in ledger.slots:
            if not slot.closed:
                self._hire(slot)

    def _end(self, slot: WorkerSlot) -> None:
        """Kill the slot's worker."""
        self._crew.dismiss(slot.number)
        if slot.info is not None:
            slot.present += self._clock() - slot.ready_since
        slot.task, slot.info, slot.last_ended = None, None, None

    def _give(self, ledger: Ledger, slot: WorkerSlot, item: Item) -> None:
        attempts = self._attempts[item.key] = self._attempts.get(item.key, 0) + 1
        slot.task, slot.given_at = Task(item, self._rules.fresh and attempts == 1), self._clock()
        self._crew.give(slot.number, slot.task)
        changes = {"attempts": attempts, "worker": slot.name, "error": "", "error_class": ""}
        self._save(ledger, item, state="running", **changes)
        self._event(ItemStarted(item=item.key, worker=slot.number, attempt=attempts))

    def _hear(self, ledger: Ledger, news: News) -> None:
        slot = ledger.slots[news.slot]
        match news:
            case Started(answer=WorkerInfo() as info):
                slot.info = slot.known = info
                slot.ready_since, slot.false_starts = self._clock(), 0
                self._event(
                    WorkerReady(worker=slot.number, host=info.host, device=info.device, gpus=info.gpus)
                )
            case Started(answer=Outcome() as outcome):
                self._end(slot)
                self._close(slot, outcome.error)
                if all(other.closed for other in ledger.slots) and outcome.verdict is not Verdict.broken:
                    raise as_error(outcome)
            case Answered(outcome=outcome):
                self._answered(ledger, slot, outcome)
            case Lost(reason=reason):
                self._lost(ledger, slot, reason)

    def _close(self, slot: WorkerSlot, reason: str) -> None:
        slot.closed = reason
        self._event(WorkerClosed(worker=slot.number, reason=last_line(reason)))

    def _answered(self, ledger: Ledger, slot: WorkerSlot, outcome: Outcome) -> None:
        assert slot.task is not None
        item, slot.task = slot.task.item, None
        slot.busy += outcome.ended - outcome.began
        if slot.last_ended is not None:
            slot.gaps += 1
            slot.gap_seconds += outcome.began - slot.last_ended
        slot.last_ended = outcome.ended if self._queue else None
        if outcome.replace:
            self._end(slot)
            self._hire(slot)
        match outcome.verdict:
            case Verdict.done:
                self._done(ledger, slot, item, outcome)
            case Verdict.busy:
                self._attempts[item.key] -= 1
                self._save(ledger, item, state="queued", attempts=self._attempts[item.key])
                if item.key not in self._waiting:
                    self._waiting.add(item.key)
                    self._event(ItemWaiting(item=item.key, reason=outcome.error))
                self._put_back(item, self._rules.busy_wait_s)
            case Verdict.fatal:
                self._fail(ledger, slot, item, outcome.error, outcome.error_class)
                raise as_error(outcome)
            case Verdict.failed:
                self._fail(ledger, slot, item, outcome.error, outcome.error_class)
            case Verdict.lost:
                raise ValueError("the crew must report a lost worker as `Lost`")
            case Verdict.retry | Verdict.broken:
                self._again(ledger, slot, item, outcome.error, outcome.error_class, at_once=False)
                self._check_storage(ledger, item, outcome)

    def _done(self, ledger: Ledger, slot: WorkerSlot, item: Item, outcome: Outcome) -> None:
        self._storage_errors.clear()
        made = outcome.made
        frames, seconds, windows = (made.frames, made.video_seconds, made.windows) if made else (0, 0.0, 0)
        slot.done += 1
        if made is not None and made.resumed_windows < made.windows:
            slot.video_seconds += seconds
        spent = outcome.ended - outcome.began
        self._save(
            ledger,
            item,
            state="done",
            window=windows,
            windows=windows,
            frames=frames,
            video_seconds=seconds,
            seconds=spent,
            bytes=outcome.size,
        )
        resumed = made.resumed_windows if made else 0
        self._event(
            ItemDone(
                item=item.key,
                video=item.name,
                worker=slot.number,
                frames=frames,
                resumed_windows=resumed,
                seconds=spent,
            )
        )

    def _lost(self, ledger: Ledger, slot: WorkerSlot, reason: str) -> None:
        task, started = slot.task, slot.info is not None
        slot.lost += 1
        self._end(slot)
        self._event(WorkerLost(worker=slot.number, reason=reason))
        slot.false_starts = 0 if started else slot.false_starts + 1
        if slot.false_starts < FALSE_STARTS:
            self._hire(slot)
        else:
            self._close(slot, reason)
        if task is not None:
            self._again(ledger, slot, task.item, f"its worker died: {reason}", WORKER_DIED, at_once=True)

    def _again(
        self, ledger: Ledger, slot: WorkerSlot, item: Item, error: str, error_class: str, *, at_once: bool
    ) -> None:
        """Queue an item for a retry, or mark it as failed after its last attempt."""
        attempts = self._attempts[item.key]
        if attempts > self._rules.retries:
            self._fail(ledger, slot, item, error, error_class)
            return
        self._save(ledger, item, state="queued", error=error, error_class=error_class)
        self._event(ItemRetried(item=item.key, attempt=attempts, error=last_line(error)))
        if at_once:
            self._queue.appendleft(item)
        else:
            self._put_back(item, self._rules.retry_wait_s * 2 ** (attempts - 1))

    def _put_back(self, item: Item, seconds: float) -> None:
        self._put_off += 1
        heapq.heappush(self._later, (self._clock() + seconds, self._put_off, item))

    def _fail(self, ledger: Ledger, slot: WorkerSlot, item: Item, error: str, error_class: str) -> None:
        slot.failed += 1
        self._save(ledger, item, state="failed", error=error, error_class=error_class)
        self._event(
            ItemFailed(
                item=item.key, line=item.line, error=last_line(error), attempts=self._attempts[item.key]
            )
        )

    def _check_storage(self, ledger: Ledger, item: Item, outcome: Outcome) -> None:
        """End the batch if no output can be written any more, before every item uses up its attempts."""
        if outcome.error_class != OutputError.__name__:
            return
        self._storage_errors.add(item.key)
        if len(self._storage_errors) > 2 * len(ledger.slots) + 1:
            raise OutputError(
                f"the last {len(self._storage_errors)} items could not be written: {outcome.error}"
            )

    def _poll(self, ledger: Ledger) -> None:
        """Record the windows that were finished since the last poll."""
        latest = self._clock() - self._rules.poll_s
        polled = [slot.number for slot in ledger.slots if slot.task is not None and slot.given_at <= latest]
        for number, progress in self._crew.progress(polled).items():
            task = ledger.slots[number].task
            if task is None or task.item.key != progress.key or not progress.windows:
                continue
            old = ledger.states[task.item.key]
            if (old.window, old.windows) != (progress.window, progress.windows):
                self._save(ledger, task.item, window=progress.window, windows=progress.windows)
                self._event(
                    ItemWindow(
                        item=task.item.key, worker=number, window=progress.window, windows=progress.windows
                    )
                )

    def _save(self, ledger: Ledger, item: Item, **changes: Any) -> None:
        state = ledger.states[item.key] = replace(ledger.states[item.key], **changes)
        self._unwritten[item.key] = state

    def _write_one(self) -> None:
        """Write one state. The batch can do without states, so a full disk causes only a warning."""
        self._written_at = self._clock()
        try:
            self._folder.write(self._unwritten.pop(next(iter(self._unwritten))))
        except OutputError as error:
            if not self._warned:
                self._warned = True
                text = f"the states of items are not saved: {error}"
                self._event(Message(text, "warning"))
