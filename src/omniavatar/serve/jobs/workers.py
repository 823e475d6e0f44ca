"""Claims jobs for the workers of a crew, extends their leases, and records how they end.

A server runs one `Workers` in a thread; `omniavatar serve worker` runs one alone, on any machine that reaches
the database and the files. Everything that must survive is in the database and the job folders, so any of
these processes may be killed at any time:

- a worker's process dies: its job is queued again at once, and goes on after its last finished window;
- this process dies: its workers end with it, and another `Workers` queues the jobs again (`presence`);
- the database does not answer: the workers go on until their leases end, and results wait to be recorded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from omniavatar.errors import OmniAvatarError, StoppedError
from omniavatar.serve.batch.crew import Answered, CrewLost, Lost, News, Started
from omniavatar.serve.batch.items import Outcome, Stop, Verdict, WorkerInfo, last_line
from omniavatar.serve.jobs.errors import StoreError
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.logs import of_job
from omniavatar.serve.jobs.presence import Presence, boot_id
from omniavatar.serve.jobs.process_crew import JobCrew
from omniavatar.serve.jobs.records import VIDEO, WORKER_LOST, Claim, JobError, JobProgress, JobResult
from omniavatar.serve.jobs.slots import JobSlot
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.worker import JobTask, job_error

_log = logging.getLogger("omniavatar.serve")

T = TypeVar("T")
Ended = Callable[[str], None]
"""Called with the id of each job that is completed or has failed for good."""


@dataclass(frozen=True)
class WorkerRules:
    """How workers use the queue. All values are seconds.

    lease: a job whose worker is silent for so long is given to another.
    beat: between two heartbeats of a worker.
    poll: between two looks into an empty queue.
    busy_pause: before the next try of a job that another process still makes.
    retry_pause: before the first retry after an error; doubles with each attempt.
    hire_pause: before a worker that could not start is started again; doubles, up to a minute.
    report: between two reports of how many workers are ready.
    keep: how long a finished video is kept at least; None for always.
    """

    lease: float = 60.0
    beat: float = 1.0
    poll: float = 0.5
    busy_pause: float = 5.0
    retry_pause: float = 2.0
    hire_pause: float = 1.0
    report: float = 15.0
    keep: float | None = None


@dataclass(frozen=True)
class WorkersStatus:
    """The crew now. errors: why workers did not start. draining: no new jobs are begun."""

    workers: int
    ready: int
    busy: int
    draining: bool
    errors: tuple[str, ...] = ()
    running: tuple[str, ...] = field(default=())


class Workers:
    """Runs the workers of one crew until `drain` or `stop`.

    open_crew: makes the crew when `run` begins.
    models: names of the models that these workers serve.
    on_end: see `Ended`.
    traces: URL of an OpenTelemetry collector; empty for none.
    """

    def __init__(
        self,
        store: JobStore,
        files: JobFiles,
        open_crew: Callable[[], JobCrew],
        models: Sequence[str],
        rules: WorkerRules = WorkerRules(),
        on_end: Ended = lambda id: None,
        traces: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._files, self._open_crew = store, files, open_crew
        self._models, self._rules, self._on_end, self._clock = tuple(models), rules, on_end, clock
        self._traces = traces
        self._crew: JobCrew
        self._slots: list[JobSlot] = []
        self._unrecorded: list[Callable[[], None]] = []
        self._draining, self._stopping = threading.Event(), threading.Event()
        self._presence = Presence(files.locks, boot_id())
        self._name = self._presence.name
        self._next_beat = self._next_sweep = self._next_report = 0.0
        self._reported, self._store_away = -1, False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """`run` in a thread."""
        self._thread = threading.Thread(target=self.run, name="workers", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Begin no more jobs; each worker ends after its window, and its job stays queued. Does not wait."""
        self._draining.set()

    def stop(self) -> None:
        """End the workers at once. Their jobs stay queued with their finished windows. Does not wait."""
        self._stopping.set()

    def join(self, seconds: float | None = None) -> bool:
        """Wait until the thread has ended; False if it has not."""
        if self._thread is None:
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def status(self) -> WorkersStatus:
        slots = list(self._slots)
        claims = [slot.claim for slot in slots]
        return WorkersStatus(
            len(slots),
            sum(slot.info is not None for slot in slots),
            sum(claim is not None for claim in claims),
            self._draining.is_set(),
            tuple(slot.error for slot in slots if slot.error),
            tuple(claim.job.id for claim in claims if claim is not None),
        )

    def run(self) -> None:
        """Work until `stop`, or until `drain` and every worker has ended its window.

        Raises what opening the crew raises.
        """
        while not self._ended():
            try:
                self._crew = self._open_crew()
            except CrewLost as lost:
                _log.error("%s; starting the workers again", lost)
                self._stopping.wait(self._rules.hire_pause)
                continue
            try:
                if self._crew.ends_along:
                    self._asked(self._done(self._presence.enter))
                self._slots = [JobSlot(number, hire_at=0.0) for number in range(self._crew.workers)]
                while not self._ended():
                    self._turn()
            except CrewLost as lost:
                _log.error("%s; starting the workers again", lost)
            finally:
                self._crew.close()
                for slot in self._slots:
                    self._give_back(slot)
                self._record()
        self._presence.leave()
        self._asked(self._done(lambda: self._store.forget_host(self._name)))

    def _ended(self) -> bool:
        if self._stopping.is_set():
            return True
        busy = any(slot.claim is not None for slot in self._slots)
        return self._draining.is_set() and not busy and not self._unrecorded

    def _turn(self) -> None:
        rules, now = self._rules, self._clock()
        for slot in self._slots:
            if slot.hire_at is not None and slot.hire_at <= now and not self._draining.is_set():
                slot.hire_at = None
                self._crew.hire(slot.number)
        self._record()
        claimed = self._claim()
        if now >= self._next_sweep:
            self._next_sweep = now + rules.lease / 4
            self._asked(self._done(self._requeue_dead))
            self._asked(self._done(lambda: self._requeued(self._store.requeue_expired())))
        for news in self._crew.wait(0.0 if claimed else min(rules.poll, rules.beat)):
            self._hear(news)
        if self._clock() >= self._next_beat:
            self._next_beat = self._clock() + rules.beat
            self._beat()
        ready = sum(slot.info is not None for slot in self._slots)
        if self._clock() >= self._next_report or ready != self._reported:
            self._next_report, self._reported = self._clock() + rules.report, ready
            self._asked(self._done(lambda: self._store.note_host(self._name, len(self._slots), ready)))

    # claims

    def _claim(self) -> bool:
        """Give a job to each idle worker; whether there was one."""
        found = False
        for slot in self._slots:
            if self._draining.is_set() or slot.info is None or slot.claim is not None:
                continue
            before = self._clock()
            worker = f"{self._name}/{slot.number}"
            claim = self._asked(partial(self._store.claim, worker, self._models, self._rules.lease))
            if claim is None:
                break
            slot.claim, slot.stop, slot.last = claim, None, None
            slot.void_at = before + self._rules.lease
            trace = slot.trace(claim, self._traces)
            self._crew.give(slot.number, JobTask(claim.job.id, claim.job.spec, trace))
            found = True
        return found

    def _requeue_dead(self) -> None:
        with closing(self._presence.dead(self._store.processes())) as dead:
            for process in dead:
                self._requeued(self._store.requeue_of(process))

    def _requeued(self, ids: Sequence[str]) -> None:
        for id in ids:
            _log.warning("job %s: its worker died, or did not report in time", id)
            if self._store.get(id).error is not None:
                self._files.drop_work(id)
                self._on_end(id)

    def _beat(self) -> None:
        """Extend the leases, and pass on who must stop."""
        busy = [slot for slot in self._slots if slot.claim is not None]
        self._look(busy)
        for slot in busy:
            if slot.claim is None:
                continue
            self._extend(slot, slot.claim)
            if self._draining.is_set() and slot.stop is None:
                slot.stop = Stop.after_window
            if slot.stop is not None and slot.info is not None:
                self._crew.stop(slot.number, slot.stop)  # again, as long as it is needed

    def _look(self, slots: Sequence[JobSlot]) -> None:
        """Note the latest progress of these workers."""
        for number, progress in self._crew.progress([slot.number for slot in slots]).items():
            if progress.key is not None:
                self._slots[number].last = progress

    def _extend(self, slot: JobSlot, claim: Claim) -> None:
        before, progress = self._clock(), slot.progress(claim)
        answer = self._asked(lambda: self._store.heartbeat(claim, progress))
        if answer is not None and not answer.lost:
            slot.void_at = before + claim.lease_seconds
            if answer.cancel:
                slot.stop = Stop.now
        elif answer is not None or self._clock() >= slot.void_at:
            text = "this worker has lost it; its process is ended"
            _log.warning("job %s: %s", claim.job.id, text, extra=of_job(claim.job.id, claim.job.spec.origin))
            slot.claim = None
            slot.end_span(text)
            self._replace(slot)

    # what workers say

    def _hear(self, news: News) -> None:
        slot = self._slots[news.slot]
        match news:
            case Started(answer=WorkerInfo() as info):
                slot.info, slot.false_starts, slot.error = info, 0, ""
            case Started(answer=Outcome() as outcome):
                _log.error("worker %s does not start: %s", slot.number, outcome.error)
                slot.error = outcome.error.strip().splitlines()[-1]
                self._replace(slot, failed=True)
            case Answered(outcome=outcome):
                self._answered(slot, outcome)
            case Lost(reason=reason):
                self._lost(slot, reason)

    def _answered(self, slot: JobSlot, outcome: Outcome) -> None:
        self._look([slot])
        claim, slot.claim = slot.claim, None
        slot.end_span(last_line(outcome.error) if outcome.error else "")
        if outcome.replace:
            self._replace(slot)
        if claim is None:
            return
        last = slot.progress(claim)
        made, rules = outcome.made, self._rules
        if outcome.verdict is Verdict.done and made is not None:
            expires = None if rules.keep is None else time.time() + rules.keep
            facts = outcome.size, made.video_seconds, made.windows, made.resumed_windows
            result = JobResult(VIDEO, *facts, expires_at=expires, warnings=last.warnings)
            self._later(lambda: self._complete(claim, result))
        elif outcome.error_class == StoppedError.__name__:
            self._later(lambda: self._release(claim, last, 0.0))
        elif outcome.verdict is Verdict.busy:
            self._later(lambda: self._release(claim, last, rules.busy_pause))
        else:
            retry = outcome.verdict in (Verdict.retry, Verdict.broken, Verdict.lost)
            _log.log(
                logging.ERROR if outcome.verdict is Verdict.broken else logging.WARNING,
                "job %s: %s",
                claim.job.id,
                outcome.error,
                extra=of_job(claim.job.id, claim.job.spec.origin),
            )
            self._fail(claim, last, job_error(outcome), retry=retry)

    def _lost(self, slot: JobSlot, reason: str) -> None:
        self._look([slot])
        claim, started = slot.claim, slot.info is not None
        _log.warning("worker %s is lost: %s", slot.number, reason)
        slot.claim = None
        slot.end_span(reason)
        slot.error = "" if started else reason
        self._replace(slot, failed=not started)
        if claim is not None:
            error = JobError(WORKER_LOST, f"its worker died again and again: {reason}", "server_error")
            self._fail(claim, slot.progress(claim), error, retry=True, pause=0.0)

    def _replace(self, slot: JobSlot, *, failed: bool = False) -> None:
        """End the slot's worker and hire another, later if it `failed` to start."""
        self._crew.dismiss(slot.number)
        slot.info = None
        slot.false_starts = slot.false_starts + 1 if failed else 0
        pause = min(60.0, self._rules.hire_pause * 2 ** (slot.false_starts - 1)) if failed else 0.0
        slot.hire_at = self._clock() + pause

    # what the store must hear; it is kept until the store answers

    def _complete(self, claim: Claim, result: JobResult) -> None:
        if self._store.complete(claim, result):
            self._files.drop_work(claim.job.id)
            self._on_end(claim.job.id)

    def _release(self, claim: Claim, last: JobProgress, pause: float) -> None:
        self._store.heartbeat(claim, last)
        self._store.release(claim, pause)
        self._tell_if_ended(claim)

    def _fail(
        self, claim: Claim, last: JobProgress, error: JobError, *, retry: bool, pause: float | None = None
    ) -> None:
        wait = self._rules.retry_pause * 2 ** min(claim.attempt - 1, 6) if pause is None else pause

        def fail() -> None:
            self._store.heartbeat(claim, last)
            if self._store.fail(claim, error, retry=retry, pause=wait):
                self._tell_if_ended(claim)

        self._later(fail)

    def _tell_if_ended(self, claim: Claim) -> None:
        if self._store.get(claim.job.id).error is not None:
            self._files.drop_work(claim.job.id)
            self._on_end(claim.job.id)

    def _give_back(self, slot: JobSlot) -> None:
        claim, slot.claim = slot.claim, None
        slot.end_span("given back")
        if claim is not None:
            last = slot.progress(claim)
            self._later(lambda: self._release(claim, last, 0.0))

    def _later(self, action: Callable[[], None]) -> None:
        self._unrecorded.append(action)

    def _record(self) -> None:
        """Tell the store what it has not heard yet, in order."""
        while self._unrecorded:
            if not self._asked(self._done(self._unrecorded[0])):
                return
            self._unrecorded.pop(0)

    def _done(self, action: Callable[[], None]) -> Callable[[], bool]:
        def act() -> bool:
            try:
                action()
            except StoreError:
                raise
            except OmniAvatarError as error:  # a file that cannot be removed; the sweep tries again
                _log.warning("%s", error)
            return True

        return act

    def _asked(self, ask: Callable[[], T]) -> T | None:
        """The store's answer; None while it does not answer, which is logged once."""
        try:
            answer = ask()
        except StoreError as error:
            if not self._store_away:
                _log.error("%s; trying again", error)
            self._store_away = True
            return None
        self._store_away = False
        return answer
