"""A worker of the queue: one engine, one job at a time, from the job's files to the delivered video.

It runs in its own process (`process_crew`), as a Ray actor, or as rank 0 of a group. It knows no database and
no lease: the process that claims jobs tells it when to stop.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from omniavatar.engine.events import Message, RequestStarted, StepFinished, WindowFinished, WindowStarted
from omniavatar.engine.marks import read_record
from omniavatar.errors import InputError, ResumeError
from omniavatar.serve.batch.items import (
    InputWarning,
    Made,
    Outcome,
    Progress,
    Seat,
    Stop,
    Verdict,
    WorkerInfo,
    is_bug,
    last_line,
)
from omniavatar.serve.batch.worker import error_outcome, open_engine
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.logs import of_job
from omniavatar.serve.jobs.records import (
    SERVER_ERROR,
    SIDECAR,
    SOURCE_VIDEO,
    THUMBNAIL,
    VIDEO,
    JobError,
    JobSpec,
    Json,
)
from omniavatar.serve.jobs.tracing import Trace, begin, flush
from omniavatar.text import one_line
from omniavatar.types import AvatarRequest, Event, SamplingParams

if TYPE_CHECKING:
    from omniavatar.engine.window_loop import ShouldStop

THUMBNAIL_SIDE = 512
FLUSH_S = 1.0
"""Longest wait for the collector of traces after a job."""
MOST_WARNINGS = 10
_log = logging.getLogger("omniavatar.serve")


@dataclass(frozen=True)
class JobTask:
    """A job given to a worker. trace: what the spans of the worker go under."""

    id: str
    spec: JobSpec
    trace: Trace | None = None

    @property
    def key(self) -> str:
        return self.id


class JobEngine(Protocol):
    """Makes videos with any of the configured models."""

    def run(
        self,
        model: str,
        request: AvatarRequest,
        output: Path,
        on_event: Callable[[Event], None],
        should_stop: ShouldStop,
    ) -> Made:
        """Write the complete video to `output`; an interrupted one goes on. Raises OmniAvatarError."""
        ...

    def device(self) -> str:
        """Name of the device, for display."""
        ...

    def intact(self) -> bool:
        """Whether the engine can make the next video after one that failed."""
        ...


class JobWorker:
    """Call `start` once, then `run` for each task; `progress` and `stop` at any time, from any thread.

    on_progress: called with each new progress.
    """

    def __init__(
        self,
        factory: Callable[[Seat], JobEngine],
        seat: Seat,
        files: JobFiles,
        folder: str,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._factory, self._seat, self._files, self._folder = factory, seat, files, folder
        self._on_progress = on_progress
        self._engine: JobEngine | None = None
        self._run: _Run | None = None

    def start(self) -> WorkerInfo | Outcome:
        """Make the engine in the folder of the server; returns an Outcome with the error on failure."""
        began = time.time()
        try:
            self._engine, info = open_engine(self._factory, self._seat, self._folder, self._files.check)
            return info
        except Exception as error:
            return error_outcome(error, began)

    def run(self, task: JobTask) -> Outcome:
        """Make the job's video and deliver it."""
        began = time.time()
        run = self._run = _Run(task, self._files, self._on_progress)
        try:
            assert self._engine is not None
            made = run.delivered() or run.make(self._engine)
            size = self._files.size(task.id, VIDEO) or 0
            outcome = Outcome(Verdict.done, began, time.time(), made, size)
        except Exception as error:
            outcome = error_outcome(error, began, usable=self._engine is not None and self._engine.intact())
        finally:
            run.close()
            self._run = None
        run.report(outcome)
        return outcome

    def progress(self) -> Progress:
        run = self._run
        return Progress(None, 0, 0) if run is None else run.progress

    def stop(self, how: Stop) -> None:
        """End the task early, if there is one; `run` then returns a StoppedError."""
        run = self._run
        if run is not None:
            run.stop(how)


class _Run:
    """One job while it is made."""

    def __init__(self, task: JobTask, files: JobFiles, on_progress: Callable[[Progress], None]) -> None:
        self._task, self._files, self._on_progress = task, files, on_progress
        self.progress = Progress(task.id, 0, 0)
        self._how: Stop | None = None
        self._between_windows = True
        self._began = time.monotonic()
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="save-work") if files.is_url else None
        self._saving: Future[None] | None = None
        self._lock = threading.Lock()
        self._span = begin(task.trace, "video", pid=os.getpid(), model=task.spec.model)
        self._note("begins")

    def report(self, outcome: Outcome) -> None:
        """Log how it ended, and end the trace."""
        error = last_line(outcome.error) if outcome.error else ""
        seconds = round(outcome.ended - outcome.began, 3)
        self._note(f"ends: {error}" if error else "is made", verdict=str(outcome.verdict), seconds=seconds)
        if self._span is not None:
            self._span.end(error=error)
            flush(FLUSH_S)

    def delivered(self) -> Made | None:
        """The result of a worker that died between the delivery and its report; None if there is none."""
        id, files = self._task.id, self._files
        if files.size(id, VIDEO) is None or files.size(id, SIDECAR) is None:
            return None
        record = read_record(files.local(id, SIDECAR)) or {}
        if record.get("bytes") != files.size(id, VIDEO):
            return None
        plan = record["plan"]
        return Made(record["frames"], record["windows"], record["resumed_windows"], plan["duration_s"])

    def make(self, engine: JobEngine) -> Made:
        id, files = self._task.id, self._files
        files.restore_work(id)
        try:
            output, made = self._made(engine)
        except ResumeError as error:  # begun by another version or with other settings, or damaged
            self._note(f"starts over: {error}", logging.WARNING)
            files.drop_work(id)
            output, made = self._made(engine)
        self.close()
        thumbnail = output.with_name("thumbnail.webp")
        write_thumbnail(output, thumbnail)
        files.put_file(id, THUMBNAIL, thumbnail)
        files.put_file(id, SIDECAR, output.with_suffix(".json"))
        files.put_file(id, VIDEO, output)  # last: `delivered` looks for it
        return made

    def _made(self, engine: JobEngine) -> tuple[Path, Made]:
        """Run the engine; returns the path of the video too."""
        id, spec, files = self._task.id, self._task.spec, self._files
        output = files.work(id)
        output.parent.mkdir(parents=True, exist_ok=True)
        request = AvatarRequest(
            spec.prompt,
            files.local(id, spec.image),
            None if spec.audio is None else files.local(id, spec.audio),
            sampling_of(spec.settings),
            size=spec.size,
            continues=None if spec.extends is None else files.local(id, SOURCE_VIDEO),
            provenance=spec.provenance or None,
        )
        return output, engine.run(spec.model, request, output, self._listen, self._should_stop)

    def stop(self, how: Stop) -> None:
        if self._how is not Stop.now:
            self._how = how

    def close(self) -> None:
        """Wait until the work is saved."""
        if self._saver is not None:
            self._saver.shutdown(wait=True)

    def _should_stop(self) -> bool:
        return self._how is Stop.now or (self._how is Stop.after_window and self._between_windows)

    def _note(self, text: str, level: int = logging.INFO, **values: Json) -> None:
        task = self._task
        extra = of_job(task.id, task.spec.origin, pid=os.getpid(), **values)
        _log.log(level, "job %s: %s", task.id, text, extra=extra)

    def _listen(self, event: Event) -> None:
        old = self.progress
        if isinstance(event, RequestStarted):
            done, windows = event.resumed_windows, event.windows
            self.progress = Progress(old.key, done, windows, 0, event.steps, None, done, old.warnings)
        elif isinstance(event, WindowStarted):
            self._between_windows = True
        elif isinstance(event, StepFinished):
            self._between_windows = False
            if event.window == old.window:  # a later one is only queued
                self._report(old.window, event.step + 1)
        elif isinstance(event, WindowFinished):
            self._report(event.window + 1, 0)
            self._note("window", logging.DEBUG, window=event.window, seconds=round(event.seconds, 3))
            if self._span is not None:
                now = time.time()
                self._span.child("window", now - event.seconds, now, window=event.window)
            self._save_work()
        elif isinstance(event, Message):
            self._note(event.text, logging.WARNING if event.level == "warning" else logging.INFO)
            if event.level == "warning" and event.about:
                self._warn(InputWarning(event.about, one_line(event.text)))

    def _report(self, window: int, step: int) -> None:
        old = self.progress
        done = window + (step / old.steps if old.steps else 0.0)
        rate = (done - old.resumed) / max(time.monotonic() - self._began, 1e-6)
        eta = (old.windows - done) / rate if rate > 0 else None
        self.progress = replace(old, window=window, step=step, eta_seconds=eta)
        self._on_progress(self.progress)

    def _warn(self, warning: InputWarning) -> None:
        old = self.progress
        if warning not in old.warnings and len(old.warnings) < MOST_WARNINGS:
            self.progress = replace(old, warnings=(*old.warnings, warning))
            self._on_progress(self.progress)

    def _save_work(self) -> None:
        """Start to save the finished windows, unless that is under way. Raises what the last time raised."""
        with self._lock:
            if self._saver is None or (self._saving is not None and not self._saving.done()):
                return
            if self._saving is not None:
                self._saving.result()
            self._saving = self._saver.submit(self._files.save_work, self._task.id)


def sampling_of(settings: Mapping[str, Json]) -> SamplingParams:
    """The sampling values of a request. Raises InputError for a setting that a request cannot change."""
    known = [field.name for field in fields(SamplingParams)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(f"{unknown[0]}: a request cannot set it; it can set {', '.join(known)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return SamplingParams(**values)


def write_thumbnail(video: Path, path: Path) -> None:
    """Write the middle of a video's first second as a WebP picture."""
    from itertools import islice

    from PIL import Image

    from omniavatar.media.inspect import read_frames

    frame = list(islice(read_frames(video), 12))[-1]
    picture = Image.fromarray(frame)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    picture.save(path, "webp", quality=85)


def job_error(outcome: Outcome) -> JobError:
    """What is kept of a failed attempt. Bugs show no trace."""
    name = outcome.error_class
    if outcome.verdict is Verdict.broken or is_bug(name):
        return JobError(SERVER_ERROR, "the server met a bug in this job; its log says more", "server_error")
    kinds = {"InputError": "invalid_request_error", "NumbersError": "server_error"}
    return JobError(code_of(name) or SERVER_ERROR, outcome.error, kinds.get(name, "server_error"))


def code_of(error_class: str) -> str:
    """The code of a job's error, by the name of its class."""
    return error_class.removesuffix("Error").lower()
