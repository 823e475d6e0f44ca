"""What the routes share: accepting a job, and looking at one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.requests import Request

from omniavatar.serve.api.access import Access, Caller, audit
from omniavatar.serve.api.addresses import AddressError, Outside, checked_url
from omniavatar.serve.api.body import Asked
from omniavatar.serve.api.checks import PORTRAIT, VOICE, Checker
from omniavatar.serve.api.errors import SERVER, ApiError, field_error
from omniavatar.serve.api.metrics import Metrics
from omniavatar.serve.api.models import Catalogue, Plan
from omniavatar.serve.api.webhooks import Webhooks
from omniavatar.serve.jobs.extensions import prepare_extension
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.logs import request_id
from omniavatar.serve.jobs.records import JobRecord, JobSpec, JobStatus, new_job_id
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.tracing import current_parent
from omniavatar.serve.settings import ServeSettings

IMAGE_NAME, SOUND_NAME = "input/portrait", "input/voice"
MOST_KEY = 255


@dataclass
class Service:
    """The parts of a server."""

    settings: ServeSettings
    store: JobStore
    files: JobFiles
    access: Access
    models: Catalogue
    checker: Checker
    outside: Outside
    webhooks: Webhooks
    metrics: Metrics
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

    def checked(self, asked: Asked, source: JobRecord | None = None) -> tuple[JobSpec, Plan]:
        """The request, checked whole, without accepting it. Raises ApiError.

        source: the finished job that an extension continues.
        """
        values, model = asked.values, self.models.name(asked.values.model)
        if source is not None:
            if values.model is not None and values.model != source.spec.model:
                raise field_error("model", f"must be {source.spec.model}, as of the video; leave it out")
            model = source.spec.model
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
        portrait = None
        if source is None:
            if PORTRAIT not in asked.files:
                raise field_error(PORTRAIT, "is missing; add a portrait", "missing_field")
            portrait = self.checker.portrait(asked.files[PORTRAIT])
        seconds = self.checker.voice(asked.files[VOICE]) if VOICE in asked.files else None
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
        self, request: Request, caller: Caller, asked: Asked, source: JobRecord | None = None
    ) -> tuple[JobRecord, bool]:
        """Accept a job, or return the one of the same idempotency key; whether it is new.

        Its files are kept, and its webhook, before it is in the queue.

        Raises ApiError, StoreError, OutputError.
        """
        key = request.headers.get("idempotency-key")
        if key is not None and (not 0 < len(key) <= MOST_KEY or not key.isascii() or not key.isprintable()):
            raise ApiError(400, "invalid_idempotency_key", "Idempotency-Key: must be 1 to 255 ASCII letters")
        digest = f"{asked.digest}" if source is None else f"{asked.digest[:32]}{source.id[-32:]}"
        if key is not None:
            found = self.store.find_idempotent(caller.key_id, key, digest)
            if found is not None:
                return found, False
        spec, _ = self.checked(asked, source)
        id, kept = new_job_id(), False
        try:
            if source is not None:
                spec = replace(spec, image=prepare_extension(self.files, source, id))
            else:
                self._put(id, spec.image, asked.files[PORTRAIT])
            if spec.audio is not None:
                self._put(id, spec.audio, asked.files[VOICE])
            if spec.webhook is not None:
                self.webhooks.expect(id, spec.webhook)
            job, kept = self.store.submit(
                caller.key_id,
                spec,
                id=id,
                idempotency_key=key,
                request_digest=digest,
                limits=caller.limits,
                most_unfinished=self.settings.queue_length,
            )
        finally:
            if not kept:
                self.files.delete(id)
                if spec.webhook is not None:
                    self.webhooks.forget(id)
        if kept:
            audit(request, "submit", job=job.id, model=spec.model)
        return job, kept

    def is_ended(self, job: JobRecord) -> bool:
        return job.status in (JobStatus.completed, JobStatus.failed)

    def _origin(self) -> dict[str, str]:
        """What logs and traces of the job are linked by."""
        found = {"request_id": request_id.get()}
        if self.settings.otlp_endpoint:
            found["traceparent"] = current_parent()
        return {name: value for name, value in found.items() if value is not None}

    def _put(self, id: str, name: str, path: Path) -> None:
        with path.open("rb") as stream:
            self.files.put(id, name, stream, self.settings.upload_bytes)

    def _check_webhook(self, url: str) -> None:
        if not self.settings.webhook_secret:
            raise field_error("webhook_url", "webhooks are off on this server; poll, or set webhook_secret")
        try:
            checked_url(url)
        except AddressError as error:
            raise field_error("webhook_url", str(error), "invalid_url") from None
