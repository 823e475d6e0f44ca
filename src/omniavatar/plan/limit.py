"""How much of the device this process may hold."""

from __future__ import annotations

from typing import Literal

import torch

from omniavatar.plan.sizes import GB

CONTEXT_BYTES = GB // 2
"""Left free under `memory: auto`, for CUDA modules that are loaded later and for other programs."""


def device_limit(memory: Literal["auto"] | float, device: torch.device) -> int | None:
    """Bytes of `device` this process may hold in all, None on a CPU without a number.

    auto: what is free and what this process holds already, less `CONTEXT_BYTES`. On CUDA never more than the
    fraction set with `torch.cuda.set_per_process_memory_fraction`.
    """
    asked = None if memory == "auto" else int(memory * GB)
    if device.type != "cuda":
        return asked
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device) - CONTEXT_BYTES
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(there, allowed) if asked is None else min(there, allowed, asked)


def enforce_limit(memory: Literal["auto"] | float, device: torch.device) -> None:
    """Hold torch's allocator to a number of GB; what CUDA itself takes (about 0.5 GB) comes besides."""
    if memory != "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * GB / total), device)
