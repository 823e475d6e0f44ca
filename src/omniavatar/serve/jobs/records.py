"""The values of a job: the request, how far it is, how it ended. Times are seconds since 1970."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

LOCAL_KEY = "local"
"""`key_id` of the jobs of a server that asks for no keys, and of `omniavatar batch`."""
JOB_ID = re.compile(r"video_[0-9a-f]{32}")

VIDEO, SIDECAR, THUMBNAIL = "output/video.mp4", "output/video.json", "output/thumbnail.webp"
"""Names of a finished job's files."""
SOURCE_VIDEO = "input/source.mp4"
"""Name of the video that a job goes on from."""

CANCELLED, WORKER_LOST, SERVER_ERROR = "cancelled", "worker_lost", "server_error"
"""Codes of `JobError` that the queue itself gives; the others are those of the command line's errors."""


class JobStatus(StrEnum):
    """The four statuses that a client sees."""

    queued = "queued"
    in_progress = "in_progress"
    completed = "completed"
    failed = "failed"


UNFINISHED = (JobStatus.queued, JobStatus.in_progress)


def new_job_id() -> str:
    return f"video_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class JobError:
    """Why a job failed. param: the field of the request at fault."""

    code: str
    message: str
    type: str
    param: str | None = None


@dataclass(frozen=True)
class JobWarning:
    """What is odd about an input of a job. param: the field of the request."""

    message: str
    param: str | None = None


@dataclass(frozen=True)
class JobSpec:
    """The request, already checked against the model's configuration.

    image, audio: names of files of the job (`input/portrait.png`).
    size: (height, width) in pixels; None lets the portrait choose.
    settings: configuration keys of this request (`seed`, `num_steps`, ...), as `--hp` takes them.
    extends: id of the finished job whose video goes on with this job's sound.
    provenance: whether the video must have a signed manifest.
    origin: `request_id` of the logs and `traceparent` of the trace that the job belongs to, if known.
    """

    model: str
    prompt: str
    image: str
    audio: str | None
    size: tuple[int, int] | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    extends: str | None = None
    webhook: str | None = None
    provenance: bool = False
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobRecord:
    """One job.

    progress: percent of the steps that are done.
    window, step: finished ones, of `windows` and, inside the current window, `steps`; 0 while unknown.
    seconds: of the video.
    attempt: how often a worker has begun it.
    resumed_windows: windows that an earlier attempt had finished.
    output: name of the video's file (`output/video.mp4`) once it is completed.
    warnings: about its inputs, from the worker.
    """

    id: str
    key_id: str
    spec: JobSpec
    status: JobStatus
    priority: int
    created_at: float
    progress: int = 0
    window: int = 0
    windows: int = 0
    step: int = 0
    steps: int = 0
    eta_seconds: float | None = None
    seconds: float | None = None
    error: JobError | None = None
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempt: int = 0
    resumed_windows: int = 0
    worker: str | None = None
    output: str | None = None
    size_bytes: int | None = None
    idempotency_key: str | None = None
    cancel_requested: bool = False
    warnings: tuple[JobWarning, ...] = ()


@dataclass(frozen=True)
class JobPage:
    """Some jobs of a list, in its order; `has_more` if others follow."""

    jobs: tuple[JobRecord, ...]
    has_more: bool


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `sequence` counts from 1 in each job.

    kind: `status` (data: status, attempt) or `progress` (data: window, windows, step, steps, progress,
    eta_seconds).
    """

    sequence: int
    at: float
    kind: str
    data: Mapping[str, Json]


@dataclass(frozen=True)
class KeyLimits:
    """What one key may use; None means no limit.

    unfinished: jobs that wait or run. running: jobs that run at the same time.
    requests_per_minute: of the API.
    """

    unfinished: int | None = None
    running: int | None = None
    requests_per_minute: int | None = None


@dataclass(frozen=True)
class JobProgress:
    """How far a worker is; fields as in `JobRecord`."""

    window: int = 0
    windows: int = 0
    step: int = 0
    steps: int = 0
    eta_seconds: float | None = None
    resumed_windows: int = 0
    warnings: tuple[JobWarning, ...] = ()

    @property
    def percent(self) -> int:
        """Of the steps; 99 at most, since only a completed job has 100."""
        if not self.windows:
            return 0
        inside = self.step / self.steps if self.steps and self.window < self.windows else 0.0
        return min(99, int(100 * (self.window + inside) / self.windows))


@dataclass(frozen=True)
class Claim:
    """A worker's right to make a job until its lease ends. A later attempt makes it void."""

    job: JobRecord
    worker: str
    attempt: int
    lease_seconds: float


@dataclass(frozen=True)
class Heartbeat:
    """The store's answer to a worker.

    cancel: the client cancelled the job. lost: the claim is void, and the worker must stop at once.
    """

    cancel: bool
    lost: bool


@dataclass(frozen=True)
class JobResult:
    """What a completed job left.

    output: name of the video's file. seconds: of the video. expires_at: None for never.
    warnings: as in `JobRecord`; with none, those that the job has are kept.
    """

    output: str
    size_bytes: int
    seconds: float
    windows: int
    resumed_windows: int = 0
    expires_at: float | None = None
    warnings: tuple[JobWarning, ...] = ()


@dataclass(frozen=True)
class EndedJob:
    """A completed or failed job; `expired` if it may be deleted."""

    id: str
    size_bytes: int
    expired: bool


class Deleted(StrEnum):
    """What `JobStore.delete` did: the record is gone (remove the files), or the worker is to stop."""

    removed = "removed"
    cancelling = "cancelling"
