"""One worker of a crew and the job that it makes."""

from __future__ import annotations

from dataclasses import dataclass

from omniavatar.serve.batch.items import Progress, Stop, WorkerInfo
from omniavatar.serve.jobs.records import Claim, JobProgress


@dataclass
class JobSlot:
    """A worker by its number in the crew, and its job.

    info: of the worker that is ready. void_at: when the lease ends, by the clock of this process.
    stop: how the worker must end its job. hire_at: when to start another worker; None while there is one.
    error: why the worker did not start.
    """

    number: int
    info: WorkerInfo | None = None
    claim: Claim | None = None
    void_at: float = 0.0
    stop: Stop | None = None
    false_starts: int = 0
    hire_at: float | None = None
    error: str = ""
    last: Progress | None = None

    def progress(self, claim: Claim) -> JobProgress:
        """The latest of the claim's job."""
        last = self.last
        if last is None or last.key != claim.job.id or not last.windows:
            return JobProgress(claim.job.window, claim.job.windows)
        return JobProgress(last.window, last.windows, last.step, last.steps, last.eta_seconds, last.resumed)
