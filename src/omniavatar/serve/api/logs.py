"""Where a server logs: JSON on stderr, the audit log in its file; and the traces of its requests."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from fastapi import FastAPI

from omniavatar.media.atomic import check_writable, translate_os_error
from omniavatar.serve.api.access import AUDIT
from omniavatar.serve.jobs.logs import JsonFormatter, log_as_json
from omniavatar.serve.jobs.tracing import provider_of


def configure(level: str, audit_path: Path) -> None:
    """Send logs to stderr, and the audit log to its file (of mode 600). Raises OutputError."""
    log_as_json(level, "uvicorn")
    check_writable(audit_path.absolute().parent)
    with translate_os_error(audit_path):
        os.close(os.open(audit_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        file = logging.FileHandler(audit_path, encoding="utf-8")
    file.setFormatter(JsonFormatter())
    audit = logging.getLogger(AUDIT)
    audit.handlers[:] = [file]
    audit.setLevel(logging.INFO)
    audit.propagate = False


def trace(app: FastAPI, endpoint: str) -> None:
    """Send a trace of each request to an OpenTelemetry collector."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider_of(endpoint),
        excluded_urls="health,ready,metrics",
        exclude_spans=["receive", "send"],
    )
