"""The routes of videos."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from omniavatar.serve.api.access import READ, WRITE, Caller, audit
from omniavatar.serve.api.body import MOST_PRIORITY, ExtensionFields, VideoFields, parsed
from omniavatar.serve.api.checks import PORTRAIT, VOICE
from omniavatar.serve.api.errors import NOT_FOUND, SERVER, ApiError, ErrorReply
from omniavatar.serve.api.replies import Deletion, Estimate, Video, VideoList, job_error, size_text, video
from omniavatar.serve.api.service import Service
from omniavatar.serve.api.streams import growing, server_sent_events
from omniavatar.serve.api.turns import in_turn
from omniavatar.serve.jobs.records import THUMBNAIL, Deleted, JobRecord, JobStatus

JobId = Annotated[str, Path(pattern=r"^video_[0-9a-f]{32}$", description="Id of a video.")]
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be served; the error names the field."},
    "5XX": {"model": ErrorReply, "description": "The server cannot serve it now."},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_POLL_S = 0.2
_THROUGH_FORM = {
    "prompt": {"type": "string"},
    "model": {"type": "string"},
    "size": {"type": "string", "description": "WIDTHxHEIGHT, one of the model's sizes"},
    "seconds": {"type": "string", "description": "Has no effect; the voice decides the length."},
    "seed": {"type": "integer"},
    "num_inference_steps": {"type": "integer"},
    "guidance_scale": {"type": "number"},
    "webhook_url": {"type": "string"},
    "provenance": {"type": "boolean"},
    "priority": {"type": "integer", "minimum": -MOST_PRIORITY, "maximum": MOST_PRIORITY},
}


def _body(required: list[str]) -> dict[str, Any]:
    files = {PORTRAIT: _BINARY["schema"], VOICE: _BINARY["schema"]}
    form = {**_THROUGH_FORM, "extra_params": {"type": "string", "description": "JSON object"}, **files}
    urls = {name: {"type": "string", "description": "data: or http(s) URL"} for name in files}
    plain = {**_THROUGH_FORM, "extra_params": {"type": "object"}, **urls}
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": form, "required": required}},
        "application/json": {"schema": {"type": "object", "properties": plain, "required": required}},
    }
    return {"requestBody": {"required": True, "content": content}}


def videos(service: Service) -> APIRouter:
    """The routes under /v1/videos."""
    router = APIRouter(prefix="/v1/videos", responses=ERRORS)
    settings = service.settings

    async def caller_of(request: Request, scope: str) -> Caller:
        return await run_in_threadpool(service.access.caller, request, scope)

    def shown(response: Response, job: JobRecord) -> Video:
        if not service.is_ended(job):
            response.headers["openai-poll-after-ms"] = str(service.load.poll_after_ms())
        return video(job)

    async def accept(request: Request) -> tuple[JobRecord, Caller]:
        caller = await run_in_threadpool(service.admitted, request)
        async with parsed(request, VideoFields, settings, service.outside) as body:
            return await in_turn(service.submit, request, caller, body), caller

    @router.post("", openapi_extra=_body(["prompt", PORTRAIT]))
    async def create_video(request: Request, response: Response) -> Video:
        """Accept a video of a portrait and a voice; it is made in the background."""
        job, _ = await accept(request)
        return shown(response, job)

    @router.post("/estimate", openapi_extra=_body(["prompt", PORTRAIT]))
    async def estimate_video(request: Request) -> Estimate:
        """What a request would need, without accepting it."""
        await caller_of(request, READ)
        async with parsed(request, VideoFields, settings, service.outside) as body:
            spec, plan = await in_turn(service.planned, body)
        waiting = (await run_in_threadpool(service.store.counts))[JobStatus.queued]
        own = await run_in_threadpool(service.compute_seconds, spec.model, plan)
        return Estimate(
            model=spec.model,
            seconds=plan.seconds,
            frames=plan.frames,
            windows=plan.windows,
            steps=plan.steps,
            size=size_text(plan.size),
            queue_position=waiting,
            compute_seconds=own,
            wait_seconds=None if own is None else own * waiting,
        )

    @router.post(
        "/sync",
        openapi_extra=_body(["prompt", PORTRAIT]),
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": _BINARY}, "description": "The finished video."}},
    )
    async def create_video_and_wait(request: Request) -> FileResponse:
        """Make a video and return its bytes. A job goes on if the client leaves."""
        job, caller = await accept(request)
        ends = time.monotonic() + settings.sync_seconds
        while not service.is_ended(job):
            if time.monotonic() > ends:
                message = f"{job.id} is not finished yet and goes on; get /v1/videos/{job.id}"
                raise ApiError(504, "not_finished", message, type=SERVER)
            await asyncio.sleep(_POLL_S)
            job = await run_in_threadpool(service.job, job.id, caller)
        headers = {"x-model": job.spec.model, "x-video-id": job.id}
        if job.started_at is not None and job.completed_at is not None:
            headers["x-inference-time-s"] = f"{job.completed_at - job.started_at:.3f}"
        return await run_in_threadpool(finished, job, headers)

    def finished(job: JobRecord, headers: dict[str, str] | None = None) -> FileResponse:
        if job.status is JobStatus.failed:
            error = job_error(job)
            assert error is not None
            status = 422 if error.type != SERVER else 500
            raise ApiError(status, error.code, f"the video failed: {error.message}", error.param, error.type)
        if job.output is None:
            message = f"the video is {job.status} ({job.progress} %); get /v1/videos/{job.id} until completed"
            raise ApiError(404, "video_not_ready", message, "video_id", NOT_FOUND)
        path = service.files.local(job.id, job.output)
        return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4", headers=headers)

    @router.get("")
    def list_videos(
        request: Request,
        after: Annotated[str | None, Query(pattern=r"^video_[0-9a-f]{32}$")] = None,
        limit: Annotated[int, Query(ge=0, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """Videos of this key, by the time of their creation."""
        caller = service.access.caller(request, READ)
        page = service.store.list(caller.key_id, after=after, limit=limit, order=order)
        data = [video(job) for job in page.jobs]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return VideoList(data=data, first_id=first, last_id=last, has_more=page.has_more)

    @router.get("/{video_id}")
    def get_video(request: Request, response: Response, video_id: JobId) -> Video:
        """One video with its status."""
        job = service.job(video_id, service.access.caller(request, READ))
        service.load.refreshed()
        return shown(response, job)

    @router.delete("/{video_id}")
    def delete_video(request: Request, response: Response, video_id: JobId) -> Deletion:
        """Delete a video with its files, also one that has just finished.

        A running one is cancelled (202); delete it again later.
        """
        caller = service.access.caller(request, WRITE)
        removed = service.store.delete(video_id, caller.key_id) is Deleted.removed
        if removed:
            service.files.delete(video_id)
        else:
            response.status_code = 202
        audit(request, "delete" if removed else "cancel", job=video_id)
        return Deletion(id=video_id, deleted=removed)

    @router.post("/{video_id}/cancel")
    def cancel_video(request: Request, response: Response, video_id: JobId) -> Video:
        """Cancel a video: at once if it waits, at its next step if it runs (202). A finished one stays."""
        caller = service.access.caller(request, WRITE)
        job = service.store.request_cancel(video_id, caller.key_id)
        if job.status is JobStatus.in_progress:
            response.status_code = 202
        elif job.status is JobStatus.failed:
            service.files.drop_work(video_id)
        audit(request, "cancel", job=video_id)
        return shown(response, job)

    @router.get(
        "/{video_id}/content",
        response_class=FileResponse,
        responses={
            200: {"content": {"video/mp4": _BINARY, "image/webp": _BINARY}, "description": "The file."},
            206: {"content": {"video/mp4": _BINARY}, "description": "A part of the file."},
            416: {"content": {"text/plain": {}}, "description": "The file has no such part."},
        },
    )
    def video_content(
        request: Request,
        video_id: JobId,
        variant: Literal["video", "partial", "thumbnail"] = "video",
        follow: bool = True,
    ) -> Response:
        """The finished video, its thumbnail, or, as `partial`, the playable file while it grows.

        With follow=false, `partial` ends where the file ends now.
        """
        caller = service.access.caller(request, READ)
        job = service.job(video_id, caller)
        if variant == "thumbnail" and job.status is JobStatus.completed:
            return FileResponse(service.files.local(job.id, THUMBNAIL), media_type="image/webp")
        if variant != "partial" or service.is_ended(job):
            return finished(job)
        path = service.files.partial(job.id)
        if path is None:
            message = f"the video is {job.status} and this server has no part of it yet; try again later"
            raise ApiError(404, "video_not_ready", message, "video_id", NOT_FOUND)
        return StreamingResponse(
            growing(service, job.id, path, follow),
            media_type="video/mp4",
            headers={"Accept-Ranges": "none"},
        )

    @router.get("/{video_id}/events", responses={200: {"content": {"text/event-stream": {}}}})
    async def video_events(request: Request, video_id: JobId) -> Response:
        """Server-sent events: windows, steps and ETA until the job ends. Last-Event-ID continues a stream."""
        caller = await caller_of(request, READ)
        await run_in_threadpool(service.job, video_id, caller)
        last = request.headers.get("last-event-id", "0")
        if not last.isascii() or not last.isdigit() or len(last) > 9:
            raise ApiError(400, "invalid_value", "Last-Event-ID: must be the id of an event", "Last-Event-ID")
        return server_sent_events(service, video_id, int(last))

    @router.post("/{video_id}/extensions", openapi_extra=_body([VOICE]))
    async def extend_video(request: Request, response: Response, video_id: JobId) -> Video:
        """Continue a finished video with more sound; the result is the whole video."""
        caller = await run_in_threadpool(service.admitted, request)
        source = await run_in_threadpool(service.job, video_id, caller)
        if source.status is not JobStatus.completed:
            message = f"the video is {source.status}; extend it when it is completed"
            raise ApiError(409, "video_not_ready", message, "video_id")
        async with parsed(request, ExtensionFields, settings, service.outside) as body:
            job = await in_turn(service.submit, request, caller, body, source)
        return shown(response, job)

    return router
