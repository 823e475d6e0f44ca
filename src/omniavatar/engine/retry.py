"""Trying again with less on the device after an allocation failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from omniavatar.errors import ResourceError

Result = TypeVar("Result")
MakeRoom = Callable[[str], None]
"""Called with the allocator's complaint; returns when there is more room, else raises ResourceError."""


def no_room(reason: str) -> None:
    """Nothing can be sent away: an error."""
    raise ResourceError(f"max_tokens: needs more GPU memory than is free ({reason}); lower max_tokens")


def with_room(run: Callable[[], Result], make_room: MakeRoom) -> Result:
    """`run()`, begun anew after each `make_room`. `run` must give the same result when it is begun anew."""
    while True:
        try:
            return run()
        except torch.OutOfMemoryError as error:
            reason = str(error).split(".")[0]
        make_room(reason)
