"""Traces of jobs, from the request through the queue to the windows, across processes.

A trace is known by its `traceparent` (W3C), which the job keeps. OpenTelemetry is imported only where a
collector is configured.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

from omniavatar import __version__

_NAME = "omniavatar"
_providers: dict[str, Any] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Trace:
    """Where spans go, and which one they belong under. parent: a `traceparent`."""

    endpoint: str
    parent: str


def provider_of(endpoint: str) -> Any:
    """The tracer provider of this process for a collector, made once."""
    with _lock:
        if endpoint not in _providers:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            about: dict[str, Any] = {
                "service.name": _NAME,
                "service.version": __version__,
                "host.name": socket.gethostname(),
                "process.pid": os.getpid(),
            }
            provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
            exporter = OTLPSpanExporter(endpoint=endpoint, timeout=5)
            provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
            _providers[endpoint] = provider
        return _providers[endpoint]


def flush(seconds: float) -> None:
    """Send what is recorded, but wait no longer than `seconds` for the collectors."""
    with _lock:
        waiting = list(_providers.values())
    for provider in waiting:
        sending = threading.Thread(target=provider.force_flush, daemon=True)
        sending.start()
        sending.join(seconds)


def current_parent() -> str | None:
    """The `traceparent` of the span that this context is in; None outside one."""
    from opentelemetry import trace

    span = trace.get_current_span()
    return _parent(span) if span.get_span_context().is_valid else None


class OpenSpan:
    """A span that has begun."""

    def __init__(self, trace: Trace, name: str, began: float | None = None, **values: Any) -> None:
        """began: seconds since 1970; None for now. values: attributes, named `video.*`."""
        from opentelemetry import propagate

        self._endpoint = trace.endpoint
        self._tracer = provider_of(trace.endpoint).get_tracer(_NAME, __version__)
        self._span = self._tracer.start_span(
            name,
            context=propagate.extract({"traceparent": trace.parent}),
            start_time=_nanoseconds(began),
            attributes=_attributes(values),
        )

    @property
    def link(self) -> Trace:
        """For spans under this one, also of other processes."""
        return Trace(self._endpoint, _parent(self._span))

    def child(self, name: str, began: float, ended: float | None = None, **values: Any) -> None:
        """Add a span under this one."""
        OpenSpan(self.link, name, began, **values).end(ended)

    def end(self, at: float | None = None, error: str = "") -> None:
        """at: seconds since 1970; None for now. error: why what it covers failed."""
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(end_time=_nanoseconds(at))


def begin(trace: Trace | None, name: str, began: float | None = None, **values: Any) -> OpenSpan | None:
    """A new span; None without a trace."""
    return None if trace is None else OpenSpan(trace, name, began, **values)


def _parent(span: Any) -> str:
    from opentelemetry.trace import format_span_id, format_trace_id

    context = span.get_span_context()
    return (
        f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-{context.trace_flags:02x}"
    )


def _nanoseconds(seconds: float | None) -> int:
    return round((time.time() if seconds is None else seconds) * 1e9)


def _attributes(values: dict[str, Any]) -> dict[str, Any]:
    return {f"video.{name}": value for name, value in values.items() if value is not None}
