"""Retrying with less GPU memory after an allocation failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from omniavatar.errors import ResourceError

Result = TypeVar("Result")


class Retry(Protocol):
    """Runs a function, and may run it again; the function must give the same result each time."""

    def __call__(self, run: Callable[[], Result]) -> Result: ...


def no_retry(run: Callable[[], Result]) -> Result:
    """`run()`, once. Raises ResourceError if an allocation fails."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"max_tokens: needs more GPU memory than is free ({_reason(error)}); lower max_tokens"
        ) from None


def retry_with_less(run: Callable[[], Result], step_down: Callable[[str], None]) -> Result:
    """`run()`; after a failed allocation, calls `step_down(reason)` and runs it again.

    `step_down` frees memory, or raises ResourceError.
    """
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            reason = _reason(error)
        step_down(reason)


def _reason(error: torch.OutOfMemoryError) -> str:
    return str(error).split(".")[0]
