"""Settings of a batch run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Settings of a batch run.

    retries: attempts at an item after the first one failed.
    fresh: make every item again, also finished and unfinished ones.
    retry_wait_s: pause before the first retry after an error; doubles with each further retry.
    busy_wait_s: pause before the next try of an item that another process works on.
    poll_s: how often progress is read; items younger than this are not polled.
    start_limit_s: how long to wait for the first worker.
    """

    retries: int = 2
    fresh: bool = False
    retry_wait_s: float = 2.0
    busy_wait_s: float = 5.0
    poll_s: float = 1.0
    start_limit_s: float = 900.0
