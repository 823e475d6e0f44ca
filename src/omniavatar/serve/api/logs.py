"""JSON logs with request ids, the audit log, and traces."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from omniavatar.media.atomic import check_writable, translate_os_error
from omniavatar.serve.api.access import AUDIT
from omniavatar.serve.api.guard import request_id
from omniavatar.text import one_line


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": one_line(record.getMessage()),
            "request_id": request_id.get(),
            **getattr(record, "values", {}),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


def configure(level: str, audit_path: Path) -> None:
    """Send logs to stderr, and the audit log to its file (of mode 600). Raises OutputError."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonFormatter())
    for name in ("omniavatar", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [stream]
        logger.setLevel(level.upper())
        logger.propagate = False
    check_writable(audit_path.absolute().parent)
    with translate_os_error(audit_path):
        os.close(os.open(audit_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        file = logging.FileHandler(audit_path, encoding="utf-8")
    file.setFormatter(JsonFormatter())
    audit = logging.getLogger(AUDIT)
    audit.handlers[:] = [file]
    audit.setLevel(logging.INFO)
    audit.propagate = False


def trace(app: FastAPI, endpoint: str) -> Any:
    """Send a trace of each request to an OpenTelemetry collector; returns the provider, to shut down."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "omniavatar"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="health,ready,metrics")
    return provider
