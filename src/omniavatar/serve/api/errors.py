"""Errors of the API as `{"error": {code, message, type, param}}`, and the status of each kind.

A client never sees the text of an exception that no error class names: it gets `server_error` and the
request's id, under which the log has the details.
"""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from omniavatar.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    OmniAvatarError,
    OutputError,
    ResourceError,
    for_clients,
    translated,
)
from omniavatar.serve.jobs.errors import (
    FileMissingError,
    FileNameError,
    FileTooLargeError,
    IdempotencyConflictError,
    JobNotFoundError,
    KeyLimitError,
    QueueFullError,
    StoreError,
)
from omniavatar.text import one_line

_log = logging.getLogger("omniavatar.serve")

INVALID, NOT_FOUND, LIMITED = "invalid_request_error", "not_found_error", "rate_limit_error"
SERVER = "server_error"

KINDS: tuple[tuple[type[OmniAvatarError], int, str, str], ...] = (
    (JobNotFoundError, 404, "not_found", NOT_FOUND),
    (FileMissingError, 404, "file_not_found", NOT_FOUND),
    (FileNameError, 404, "not_found", NOT_FOUND),
    (FileTooLargeError, 413, "too_large", INVALID),
    (IdempotencyConflictError, 409, "idempotency_conflict", INVALID),
    (KeyLimitError, 429, "key_limit", LIMITED),
    (QueueFullError, 503, "queue_full", SERVER),
    (StoreError, 503, "database_unavailable", SERVER),
    (InputError, 400, "invalid_input", INVALID),
    (ConfigError, 400, "invalid_value", INVALID),
    (CheckpointError, 503, "model_unavailable", SERVER),
    (ResourceError, 503, "unavailable", SERVER),
    (OutputError, 507, "storage_full", SERVER),
)
"""Class, status, code and type; the first class that fits counts."""
_OWN = (InputError, ConfigError)
"""Errors of the client's own values; one that names a path is the server's."""


class ErrorBody(BaseModel):
    """What went wrong. param: the field at fault."""

    code: str
    message: str
    type: str
    param: str | None = None


class ErrorReply(BaseModel):
    """Body of every reply with an error status."""

    error: ErrorBody


class ApiError(OmniAvatarError):
    """An error with its status, made by the API itself."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        type: str = INVALID,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.type = status, code, param, type
        self.headers = headers or {}


def field_error(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """The error of one field of the request; its message begins with the field."""
    return ApiError(400, code, f"{param}: {message}", param)


def reply(error: ApiError) -> JSONResponse:
    body = ErrorReply(
        error=ErrorBody(code=error.code, message=one_line(str(error)), type=error.type, param=error.param)
    )
    return JSONResponse(body.model_dump(), error.status, error.headers)


def as_api_error(error: Exception) -> ApiError:
    """The reply to any exception."""
    if isinstance(error, ApiError):
        return error
    known = error if isinstance(error, OmniAvatarError) else translated(error)
    for kind, status, code, type in KINDS:
        if isinstance(known, kind):
            shown = text = str(known)
            if isinstance(known, _OWN) or known.public is not None:
                shown = for_clients(known.__class__, text)
            if shown != text:
                _log.error("%s: %s", code, text)
                if isinstance(known, _OWN):
                    status, code, type = 503, "unavailable", SERVER
            headers = {"Retry-After": "10"} if status in (429, 503) else {}
            return ApiError(status, code, shown, None, type, headers)
    _log.error("a bug in this server", exc_info=error)
    return ApiError(
        500, "server_error", "the server met an unexpected error; its log has the request id", None, SERVER
    )


def install(app: FastAPI) -> None:
    """Let the app answer all exceptions in this form."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return _counted(request, as_api_error(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = error.status_code
        name = re.sub(r"\W+", "_", HTTPStatus(status).phrase.lower())
        kind = NOT_FOUND if status == 404 else INVALID if status < 500 else SERVER
        headers = dict(error.headers or {})
        return _counted(request, ApiError(status, name, str(error.detail), None, kind, headers))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _counted(request, validation_error(error.errors()))

    app.add_exception_handler(OmniAvatarError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)


def validation_error(problems: Any) -> ApiError:
    """The error of the first problem that pydantic found."""
    first = problems[0]
    places = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(places) or None
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if first["type"] == "extra_forbidden":
        return field_error(param or "body", "is no field of this request; remove it", "unknown_field")
    if first["type"] == "missing":
        return field_error(param or "body", "is missing; add it", "missing_field")
    return ApiError(400, "invalid_value", f"{param}: {message}" if param else message, param)


def _counted(request: Request, error: ApiError) -> JSONResponse:
    request.state.error_code = error.code
    return reply(error)
