"""One worker of a crew and the job that it makes."""

from __future__ import annotations

from dataclasses import dataclass

from omniavatar.serve.batch.items import Progress, Stop, WorkerInfo
from omniavatar.serve.jobs.records import Claim, JobProgress, JobWarning
from omniavatar.serve.jobs.tracing import OpenSpan, Trace, begin

PARAMS = {"image": "input_reference", "audio": "audio_reference", "prompt": "prompt"}
"""Fields of a request by what a warning is about."""


@dataclass
class JobSlot:
    """A worker by its number in the crew, and its job.

    info: of the worker that is ready. void_at: when the lease ends, by the clock of this process.
    span: of the trace that the job belongs to.
    stop: how the worker must end its job. hire_at: when to start another worker; None while there is one.
    error: why the worker did not start.
    """

    number: int
    info: WorkerInfo | None = None
    claim: Claim | None = None
    span: OpenSpan | None = None
    void_at: float = 0.0
    stop: Stop | None = None
    false_starts: int = 0
    hire_at: float | None = None
    error: str = ""
    last: Progress | None = None

    def progress(self, claim: Claim) -> JobProgress:
        """The latest of the claim's job."""
        last, job = self.last, claim.job
        if last is None or last.key != job.id:
            return JobProgress(job.window, job.windows)
        warnings = tuple(JobWarning(each.text, PARAMS.get(each.about)) for each in last.warnings)
        if not last.windows:
            return JobProgress(job.window, job.windows, warnings=warnings)
        return JobProgress(
            last.window, last.windows, last.step, last.steps, last.eta_seconds, last.resumed, warnings
        )

    def trace(self, claim: Claim, endpoint: str) -> Trace | None:
        """Begin the span of a job that this worker gets now; returns what spans of the worker go under."""
        job, parent = claim.job, claim.job.spec.origin.get("traceparent")
        origin = Trace(endpoint, parent) if endpoint and parent else None
        if origin is not None and claim.attempt == 1:
            OpenSpan(origin, "queue", job.created_at, job=job.id).end()
        self.span = begin(origin, "worker", job=job.id, model=job.spec.model, attempt=claim.attempt)
        return None if self.span is None else self.span.link

    def end_span(self, error: str = "") -> None:
        """error: why the worker did not make the video."""
        span, self.span = self.span, None
        if span is not None:
            span.end(error=error)
