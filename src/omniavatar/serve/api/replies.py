"""The objects of the dialect, made from job records."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel

from omniavatar.errors import OmniAvatarError, for_clients
from omniavatar.serve.api.checks import PORTRAIT, VOICE
from omniavatar.serve.api.errors import ErrorBody
from omniavatar.serve.api.models import Plan
from omniavatar.serve.batch.items import ERRORS
from omniavatar.serve.jobs.records import SOURCE_VIDEO, WORKER_LOST, JobRecord
from omniavatar.serve.jobs.worker import code_of

_KINDS = {code_of(kind.__name__): kind for kind in ERRORS}


class VideoWarning(BaseModel):
    """What is odd about an input, and what to do. param: the field of the request."""

    message: str
    param: str | None = None


class Video(BaseModel):
    """A video job. seconds: of the video, as text like in the dialect; "0" while unknown."""

    id: str
    object: Literal["video"] = "video"
    model: str
    prompt: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    seconds: str
    size: str
    error: ErrorBody | None = None
    remixed_from_video_id: str | None = None
    window: int = 0
    windows: int = 0
    step: int = 0
    steps: int = 0
    eta_seconds: float | None = None
    warnings: list[VideoWarning] = []


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deletion(BaseModel):
    """deleted: false if a worker still makes the video; it stops at the next step."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool


class ListedModel(BaseModel):
    """A configured model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "omniavatar"
    sizes: list[str]
    fps: int


class ModelList(BaseModel):
    """All models; the first is the default."""

    object: Literal["list"] = "list"
    data: list[ListedModel]


class Estimate(BaseModel):
    """What a request would need. Times are null until a video of the model was made."""

    object: Literal["video.estimate"] = "video.estimate"
    model: str
    seconds: float
    frames: int
    windows: int
    steps: int
    size: str
    queue_position: int
    compute_seconds: float | None
    wait_seconds: float | None


def size_text(size: tuple[int, int]) -> str:
    """WxH of (height, width)."""
    return f"{size[1]}x{size[0]}"


def _by_fields(job: JobRecord, text: str) -> str:
    """The text with fields of the request in place of the paths of its files."""
    for name, field in ((job.spec.image, PORTRAIT), (job.spec.audio, VOICE), (SOURCE_VIDEO, "video")):
        if name is not None:
            text = re.sub(rf"\S*/{job.id}/{re.escape(name)}(?![\w.])", field, text)
    return text


def job_error(job: JobRecord) -> ErrorBody | None:
    """Why a job failed, for its client: its files by their fields, and no path or address of the server."""
    error = job.error
    if error is None:
        return None
    kind, text = _KINDS.get(error.code, OmniAvatarError), error.message
    if error.code == WORKER_LOST:  # Ray names its nodes
        text = "the processes that made this video died again and again; the server's log says why"
    text = _by_fields(job, text)
    return ErrorBody(code=error.code, message=for_clients(kind, text), type=error.type, param=error.param)


def video(job: JobRecord, plan: Plan | None = None) -> Video:
    """The job as clients see it. plan: of its request, for what is not known before it runs."""
    seconds = job.seconds if job.seconds is not None else plan.seconds if plan else 0.0
    size = job.spec.size or (plan.size if plan else (0, 0))
    return Video(
        id=job.id,
        model=job.spec.model,
        prompt=job.spec.prompt,
        status=job.status.value,
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        seconds=f"{seconds:g}",
        size=size_text(size),
        error=job_error(job),
        remixed_from_video_id=job.spec.extends,
        window=job.window,
        windows=job.windows or (plan.windows if plan else 0),
        step=job.step,
        steps=job.steps or (plan.steps if plan else 0),
        eta_seconds=job.eta_seconds,
        warnings=[
            VideoWarning(message=_by_fields(job, each.message), param=each.param) for each in job.warnings
        ],
    )
