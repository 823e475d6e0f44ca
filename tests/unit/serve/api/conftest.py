"""The server of `serve_api` for each test of the API."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from serve_api import empty_database as empty_database
from serve_api import serve as serve


@pytest.fixture(autouse=True)
def loggers_restored() -> Iterator[None]:
    """Commands that run in this process configure its loggers."""
    loggers = [logging.getLogger(name) for name in ("omniavatar", "opentelemetry", "uvicorn")]
    before = [(each.handlers[:], each.level, each.propagate) for each in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
