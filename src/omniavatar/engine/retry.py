"""Retrying with less on the device after an allocation failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from omniavatar.errors import ResourceError

Result = TypeVar("Result")


class Retry(Protocol):
    """Runs a function that gives the same result when it is started again."""

    def __call__(self, run: Callable[[], Result]) -> Result: ...


def no_retry(run: Callable[[], Result]) -> Result:
    """`run()`. Raises ResourceError when the device's memory does not suffice."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"max_tokens: needs more GPU memory than is free ({_reason(error)}); lower max_tokens"
        ) from None


def retry_with_less(run: Callable[[], Result], step_down: Callable[[str], None]) -> Result:
    """`run()`, started again after each `step_down(reason)`, which frees memory or raises ResourceError."""
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            reason = _reason(error)
        step_down(reason)


def _reason(error: torch.OutOfMemoryError) -> str:
    return str(error).split(".")[0]
