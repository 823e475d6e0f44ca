"""Stopping a run from outside: the caller's `should_stop` is called before each step and each encoder."""

from __future__ import annotations

from collections.abc import Callable

from omniavatar.errors import StoppedError

ShouldStop = Callable[[], bool]
"""Returns True once the run must end, such as `threading.Event().is_set`."""


def never() -> bool:
    """The `should_stop` of a run that nobody stops."""
    return False


def end_if(stop: bool, where: str) -> None:
    """Raise StoppedError if `stop`."""
    if stop:
        raise StoppedError(f"the run was stopped {where}; finished windows are kept")
