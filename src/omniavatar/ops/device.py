"""Which device a name means."""

from __future__ import annotations

import torch

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
