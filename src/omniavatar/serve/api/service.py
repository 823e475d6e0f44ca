"""What the routes share: accepting a job, and looking at one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from starlette.requests import Request

from omniavatar.media.temporary import temporary_folder
from omniavatar.serve.api.access import WRITE, Access, Caller, audit
from omniavatar.serve.api.addresses import AddressError, Outside, checked_url
from omniavatar.serve.api.body import NAMES, Asked, Body
from omniavatar.serve.api.checks import PORTRAIT, VOICE, Checker
from omniavatar.serve.api.errors import SERVER, ApiError, field_error
from omniavatar.serve.api.load import QueueLoad
from omniavatar.serve.api.metrics import Metrics
from omniavatar.serve.api.models import Catalogue, Plan, window_seconds
from omniavatar.serve.api.refusals import check_extension, check_voice
from omniavatar.serve.api.webhooks import Webhooks
from omniavatar.serve.jobs.errors import QueueFullError, StoreError
from omniavatar.serve.jobs.extensions import prepare_extension
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.logs import request_id
from omniavatar.serve.jobs.records import JobRecord, JobSpec, JobStatus, new_job_id
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.tracing import current_parent
from omniavatar.serve.settings import ServeSettings

IMAGE_NAME, SOUND_NAME = f"input/{NAMES[PORTRAIT]}", f"input/{NAMES[VOICE]}"
MOST_KEY = 255


@dataclass
class Service:
    """The parts of a server.

    times: seconds that a model needs for a plan, or None; without it, a median of its last videos.
    """

    settings: ServeSettings
    store: JobStore
    files: JobFiles
    access: Access
    models: Catalogue
    checker: Checker
    outside: Outside
    webhooks: Webhooks
    metrics: Metrics
    load: QueueLoad
    times: Callable[[str, Plan], float | None] | None = None
    _streams: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a long reply while it lasts. Raises ApiError if too many run."""
        self.open_stream()
        try:
            yield
        finally:
            self.close_stream()

    def open_stream(self) -> None:
        with self._lock:
            if self._streams >= self.settings.event_streams:
                message = "too many event streams are open; poll instead, or try again later"
                raise ApiError(503, "busy", message, type=SERVER, headers={"Retry-After": "10"})
            self._streams += 1

    def close_stream(self) -> None:
        with self._lock:
            self._streams -= 1

    def job(self, id: str, caller: Caller) -> JobRecord:
        """Raises JobNotFoundError, also for a job of another key."""
        return self.store.get(id, caller.key_id)

    def admitted(self, request: Request) -> Caller:
        """Who asks for a new job, before the body is read. Raises ApiError, QueueFullError, StoreError.

        A request with an idempotency key may belong to a job that the queue has, so it is read first.
        """
        caller = self.access.caller(request, WRITE)
        most = self.settings.queue_length
        if self.load.refreshed() >= most and "idempotency-key" not in request.headers:
            raise QueueFullError(f"the queue is full ({most} jobs); try again later")
        return caller

    def planned(self, body: Body) -> tuple[JobSpec, Plan]:
        """What a request would make, without accepting it. Raises ApiError."""
        with temporary_folder("upload") as folder:
            return self.checked(body.write(folder))

    def compute_seconds(self, model: str, plan: Plan) -> float | None:
        """Seconds that a worker needs for the plan; None while unknown. Raises StoreError."""
        if self.times is not None:
            return self.times(model, plan)
        each = window_seconds(self.store, model)
        return None if each is None else each * plan.windows

    def checked(self, asked: Asked, source: JobRecord | None = None) -> tuple[JobSpec, Plan]:
        """The request, checked whole, without accepting it. Raises ApiError.

        source: the finished job that an extension continues.
        """
        values, model = asked.values, self.models.name(asked.values.model)
        if source is not None:
            if values.model is not None and values.model != source.spec.model:
                raise field_error("model", f"must be {source.spec.model}, as of the video; leave it out")
            model = self.models.name(source.spec.model)
            check_extension(self.models.configs[model], source)
            for name in ("size", PORTRAIT):
                if getattr(values, name, None) is not None or name in asked.files:
                    raise field_error(name, "is that of the video; leave it out")
            if VOICE not in asked.files:
                raise field_error(VOICE, "is missing; add the sound that follows", "missing_field")
        given = {
            "seed": values.seed,
            "num_steps": values.num_inference_steps,
            "guidance_scale": values.guidance_scale,
        }
        settings = self.models.settings(model, given, values.extra_params)
        if source is not None:
            settings = {**source.spec.settings, **settings}
        size = self.models.size(model, values.size) if source is None else source.spec.size
        if values.webhook_url is not None:
            self._check_webhook(values.webhook_url)
        if values.provenance:
            self.models.check_provenance(model)
        if source is None and PORTRAIT not in asked.files:
            raise field_error(PORTRAIT, "is missing; add a portrait", "missing_field")
        check_voice(self.models.configs[model], VOICE in asked.files)
        portrait, seconds = self.checker.check(asked.files.get(PORTRAIT), asked.files.get(VOICE))
        plan = self.models.plan(model, size, portrait, seconds, settings)
        spec = JobSpec(
            model=model,
            prompt=values.prompt or (source.spec.prompt if source else ""),
            image=IMAGE_NAME,
            audio=None if seconds is None else SOUND_NAME,
            size=plan.size,
            settings=settings,
            extends=None if source is None else source.id,
            webhook=values.webhook_url,
            provenance=values.provenance or (source is not None and source.spec.provenance),
            origin=self._origin(),
        )
        return spec, plan

    def submit(
        self, request: Request, caller: Caller, body: Body, source: JobRecord | None = None
    ) -> JobRecord:
        """Accept a job, or return the one of the same idempotency key.

        Its files are on the disk, and its webhook is in the database, before it is in the queue. All of it is
        one call, so that an accept waits for a thread only once.

        Raises ApiError, StoreError, OutputError.
        """
        key = request.headers.get("idempotency-key")
        if key is not None and (not 0 < len(key) <= MOST_KEY or not key.isascii() or not key.isprintable()):
            raise ApiError(400, "invalid_idempotency_key", "Idempotency-Key: must be 1 to 255 ASCII letters")
        id, hooked, sealed, kept = new_job_id(), False, False, False
        try:
            asked = body.write(self.files.draft(id))
            digest = asked.digest if source is None else f"{asked.digest[:32]}{source.id[-32:]}"
            if key is not None:
                found = self.store.find_idempotent(caller.key_id, key, digest)
                if found is not None:
                    return found
            spec, _ = self.checked(asked, source)
            sealed = True
            self.files.seal(id)
            if source is not None:
                spec = replace(spec, image=prepare_extension(self.files, source, id))
            if spec.webhook is not None:
                self.webhooks.expect(id, spec.webhook)
                hooked = True
            try:
                job, kept = self.store.submit(
                    caller.key_id,
                    spec,
                    id=id,
                    priority=body.values.priority,
                    idempotency_key=key,
                    request_digest=digest,
                    limits=caller.limits,
                    most_unfinished=self.settings.queue_length,
                )
            except StoreError:
                kept = True  # it may be in the queue all the same; retention removes files without a job
                raise
        finally:
            if not kept:
                self.files.delete(id) if sealed else self.files.drop_draft(id)
                if hooked:
                    self.webhooks.forget(id)
        if kept:
            audit(request, "submit", job=job.id, model=spec.model)
        return job

    def is_ended(self, job: JobRecord) -> bool:
        return job.status in (JobStatus.completed, JobStatus.failed)

    def _origin(self) -> dict[str, str]:
        """What logs and traces of the job are linked by."""
        found = {"request_id": request_id.get()}
        if self.settings.otlp_endpoint:
            found["traceparent"] = current_parent()
        return {name: value for name, value in found.items() if value is not None}

    def _check_webhook(self, url: str) -> None:
        if not self.settings.webhook_secret:
            raise field_error("webhook_url", "webhooks are off on this server; poll, or set webhook_secret")
        try:
            checked_url(url)
        except AddressError as error:
            raise field_error("webhook_url", str(error), "invalid_url") from None
