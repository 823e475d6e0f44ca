"""How much memory of the device this process may hold."""

from __future__ import annotations

from typing import Literal

import torch

from omniavatar.plan.sizes import GB

CONTEXT_BYTES = GB // 2
"""Bytes left free with `memory: auto`, for CUDA modules that are loaded later and for other programs."""


def device_limit(memory: Literal["auto"] | float, device: torch.device) -> int | None:
    """Bytes of `device` that this process may hold in total; None means no limit (a CPU with `auto`).

    On CUDA, the limit is the smallest of:

    - free memory and what this process holds already, less `CONTEXT_BYTES`;
    - the fraction set with `torch.cuda.set_per_process_memory_fraction`;
    - `memory`, if it is a number of GB.
    """
    configured = None if memory == "auto" else int(memory * GB)
    if device.type != "cuda":
        return configured
    free, total = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device) - CONTEXT_BYTES
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(available, allowed) if configured is None else min(available, allowed, configured)


def enforce_limit(memory: Literal["auto"] | float, device: torch.device) -> None:
    """Limit torch's allocator to `memory` GB; CUDA itself takes about 0.5 GB more. No effect with `auto`."""
    if memory != "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * GB / total), device)
