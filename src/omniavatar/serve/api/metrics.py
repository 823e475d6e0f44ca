"""Prometheus metrics of a server: requests, queue, seconds a window, GPU memory, errors by kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from omniavatar.serve.jobs.errors import JobNotFoundError
from omniavatar.serve.jobs.records import JobRecord, JobStatus
from omniavatar.serve.jobs.store import JobStore

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 10, 60)
_WINDOW = (0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Metrics:
    """Counters of this process, and gauges that are read for each reply.

    memory: number, used and total bytes of each GPU.
    """

    def __init__(
        self,
        store: JobStore,
        memory: Callable[[], list[tuple[int, int, int]]] | None = None,
    ) -> None:
        self._store, self._memory = store, memory or gpu_memory
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "omniavatar_request_seconds",
            "Time to answer a request",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._errors = Counter("omniavatar_errors", "Errors by kind", ("kind",), registry=self.registry)
        self._windows = Histogram(
            "omniavatar_window_seconds",
            "Seconds a window of finished videos",
            ("model",),
            buckets=_WINDOW,
            registry=self.registry,
        )
        self._ended = Counter(
            "omniavatar_jobs_ended", "Jobs by their end", ("status",), registry=self.registry
        )
        self._lock = threading.Lock()
        self.registry.register(self)  # type: ignore[arg-type]

    def request(self, method: str, route: str, status: int, seconds: float, error: str | None) -> None:
        known = method if method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH") else "other"
        self._requests.labels(known, route, str(status)).observe(seconds)
        if error is not None:
            self._errors.labels(error).inc()

    def ended(self, job: JobRecord) -> None:
        """Count a job that workers of this process have ended."""
        self._ended.labels(str(job.status)).inc()
        if job.error is not None:
            self._errors.labels(job.error.code).inc()
        made = job.windows - job.resumed_windows
        if job.status is JobStatus.completed and made > 0 and job.started_at and job.completed_at:
            self._windows.labels(job.spec.model).observe((job.completed_at - job.started_at) / made)

    def ended_id(self, id: str) -> None:
        """`ended` by the job's id; a job that was deleted meanwhile is not counted."""
        with suppress(JobNotFoundError):
            self.ended(self._store.get(id))

    def collect(self) -> Iterator[Metric]:
        queue = GaugeMetricFamily("omniavatar_jobs", "Jobs by status", labels=["status"])
        for status, count in self._store.counts().items():
            queue.add_metric([str(status)], count)
        yield queue
        ready = self._store.ready_workers()
        yield GaugeMetricFamily("omniavatar_workers_ready", "Workers with a loaded model", value=ready)
        memory = GaugeMetricFamily("omniavatar_gpu_memory_bytes", "GPU memory", labels=["gpu", "kind"])
        for gpu, used, total in self._memory():
            memory.add_metric([str(gpu), "used"], used)
            memory.add_metric([str(gpu), "total"], total)
        yield memory

    def describe(self) -> list[Metric]:
        return []

    def text(self) -> bytes:
        """Raises StoreError."""
        with self._lock:
            return generate_latest(self.registry)


def gpu_memory() -> list[tuple[int, int, int]]:
    """Number, used and total bytes of each NVIDIA GPU; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            info = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
            found.append((number, int(info.used), int(info.total)))
        return found
    finally:
        pynvml.nvmlShutdown()
