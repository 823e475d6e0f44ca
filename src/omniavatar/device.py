"""Choosing a device by name, and copies between host and device that do not make either wait.

An ordinary copy from or to pageable memory drains the device's queue, and the device then idles until the
host has queued new work. Here both directions use pinned memory and are only queued, in the order of the
current stream. An uploaded tensor may be used at once; a downloaded one may be read after `arrival`.
Without CUDA every copy is complete when the function returns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omniavatar.errors import ResourceError


def choose_device(name: str) -> torch.device:
    """The device called `name`, a CUDA device with its number; `auto` is CUDA when there is one.

    Raises ResourceError if it is missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError("device: no CUDA device here; use device=cpu or device=auto")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ResourceError(
                f"device: {name} does not exist, there are {torch.cuda.device_count()} CUDA devices; "
                "choose a lower number"
            )
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return device


def device_name(device: torch.device) -> str:
    """What the user knows the device as."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
