"""Copies between host and device that make neither wait for the other.

An ordinary copy from or to pageable memory drains the device's queue, and the device then idles until the
host has queued new work. Here both directions go through pinned memory and are only queued, in the order of
the current stream: what is uploaded may be used at once, what is downloaded may be read after `arrival`.
Without CUDA everything is there at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the host on `device`. They may be changed or freed at once."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def download(values: Tensor) -> Tensor:
    """`values` in host memory, complete once an `arrival` asked for after this call has been waited for."""
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def arrival(device: torch.device) -> Callable[[], None]:
    """A function that blocks, asleep, until `device` has done all that is queued now; for any thread."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event.synchronize
