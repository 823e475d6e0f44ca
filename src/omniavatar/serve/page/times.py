"""How long a video takes on this machine, before it is made.

A model's cost function gives seconds, or any unit, for a plan. The last videos of the model give the factor
between that and what this machine really took. Without a measured cost function, the cost of a plan is its
forwards times its tokens, and the first video gives the factor.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from typing import TypeAlias

from omniavatar.errors import ConfigError
from omniavatar.plan.run import RunPlan
from omniavatar.serve.api.models import Catalogue, Plan
from omniavatar.serve.jobs.records import JobRecord, JobStatus
from omniavatar.serve.jobs.store import JobStore

Cost: TypeAlias = Callable[[RunPlan], float]
RECENT = 20
"""Videos that the factor is the median of, at most."""


def work(plan: RunPlan) -> float:
    """Forwards times tokens."""
    return float(plan.forwards * plan.tokens)


class Times:
    """Seconds of a plan by model."""

    def __init__(self, store: JobStore, models: Catalogue) -> None:
        self._store, self._models = store, models
        self._costs: dict[str, Cost] = {}
        self._lock = threading.Lock()
        self._measuring: set[str] = set()

    def begin(self, model: str) -> None:
        """Note that the model is being measured now."""
        with self._lock:
            self._measuring.add(model)

    def finish(self, model: str, cost: Cost | None) -> None:
        """Note that the measurement has ended; None if it failed."""
        with self._lock:
            self._measuring.discard(model)
            if cost is not None:
                self._costs[model] = cost

    def is_measuring(self, model: str) -> bool:
        with self._lock:
            return model in self._measuring

    def __call__(self, model: str, plan: Plan) -> float | None:
        """Seconds for the plan; None while neither a measurement nor a finished video tells.

        Raises StoreError.
        """
        with self._lock:
            cost = self._costs.get(model)
        factor = self._factor(model, cost or work)
        if factor is None:
            return None if cost is None else cost(plan.run)
        return (cost or work)(plan.run) * factor

    def _factor(self, model: str, cost: Cost) -> float | None:
        """What the last videos took, over their cost."""
        page = self._store.list(status=JobStatus.completed, limit=100)
        jobs = [job for job in page.jobs if job.spec.model == model and job.spec.extends is None]
        ratios = [ratio for job in jobs[:RECENT] if (ratio := self._ratio(job, cost)) is not None]
        return statistics.median(ratios) if ratios else None

    def _ratio(self, job: JobRecord, cost: Cost) -> float | None:
        """None for a job that says nothing, such as one of settings that the model no longer takes."""
        made = job.windows - job.resumed_windows
        if job.started_at is None or job.completed_at is None or not job.seconds or made <= 0:
            return None
        if job.attempt > 1 or job.resumed_windows:  # it also waited
            return None
        video = self._models.configs[job.spec.model].video
        voice = max(0.1, job.seconds - video.silence_duration_s) if job.spec.audio else None
        try:
            plan = self._models.plan(job.spec.model, job.spec.size, None, voice, job.spec.settings)
        except ConfigError:
            return None
        return (job.completed_at - job.started_at) / cost(plan.run)
