"""JSON logs of servers and workers. A line of a job has the id of its request."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from omniavatar.text import one_line

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that this context serves."""


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


def log_as_json(level: str, *names: str) -> None:
    """Send the logs of the package, and of the loggers `names`, to stderr."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonFormatter())
    for name in ("omniavatar", "opentelemetry", *names):
        logger = logging.getLogger(name)
        logger.handlers[:] = [stream]
        logger.setLevel(level.upper())
        logger.propagate = False


def of_job(id: str, origin: Mapping[str, str], **values: Any) -> dict[str, Any]:
    """`extra` of a log line about a job. origin: as in `JobSpec`."""
    return {"values": {"request_id": origin.get("request_id"), "job": id, **values}}
