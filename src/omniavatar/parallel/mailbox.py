"""Access to the memory of other GPUs in this machine, through torch's symmetric memory.

All ranks of a group allocate and map memory together. Each allocation has a signal pad through which the GPUs
synchronise without the host, so the exchanges can be captured in a CUDA graph.
Source: PyTorch SymmetricMemory (torch.distributed._symmetric_memory; its multicast is not used).
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ALIGN = 2**21
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Reach:
    """The GPU of one rank.

    machine: host name and boot id, so that containers and reboots differ.
    device: number of the GPU; -1 for any other device.
    reaches: numbers of the GPUs whose memory it can access.
    """

    machine: str
    device: int
    reaches: tuple[int, ...]

    @classmethod
    def of(cls, device: torch.device) -> Reach:
        """The `Reach` of a device; one that is not CUDA reaches nothing."""
        boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
        machine = f"{socket.gethostname()} {boot}"
        if device.type != "cuda":
            return cls(machine, -1, ())
        mine = torch.cuda.current_device() if device.index is None else device.index
        others = [other for other in range(torch.cuda.device_count()) if other != mine]
        reached = [other for other in others if torch.cuda.can_device_access_peer(mine, other)]
        return cls(machine, mine, tuple(reached))


def obstacle(reaches: Sequence[Reach]) -> str | None:
    """Why the GPUs of these ranks cannot write into each other's memory; None if they can."""
    for one in reaches:
        for other in reaches:
            if one is other:
                continue
            if -1 in (one.device, other.device):
                return "needs CUDA"
            if one.machine != other.machine:
                return (
                    f"the GPUs are in different machines ({one.machine.split()[0]}, "
                    f"{other.machine.split()[0]})"
                )
            if one.device == other.device:
                return f"two processes use GPU number {one.device}"
            if other.device not in one.reaches:
                return f"GPU {one.device} cannot write into the memory of GPU {other.device}"
    return None


class SymmetricSlot:
    """Implements `direct.Slot`."""

    def __init__(self, handle: Any, buffer: Tensor, timeout: timedelta) -> None:
        self._handle, self._buffer = handle, buffer
        self._timeout_ms = int(timeout.total_seconds() * 1000)
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}

    @property
    def size(self) -> int:
        return self._buffer.numel()

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        key = rank, tuple(shape), dtype
        if key not in self._views:
            size = math.prod(shape) * dtype.itemsize
            whole: Tensor = self._handle.get_buffer(rank, [self.size], torch.uint8)
            self._views[key] = whole[:size].view(dtype).view(*shape)
        return self._views[key]

    def meet(self) -> None:
        self._handle.barrier(channel=0, timeout_ms=self._timeout_ms)


class SymmetricMailbox:
    """Implements `direct.Mailbox`.

    To enlarge a slot, all ranks wait for their GPUs and allocate a new one. A slot that a CUDA graph has
    captured is kept, because a replay writes into it again.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: timedelta) -> None:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self._group, self._device, self._timeout = group, device, timeout
        self._slots: dict[int, SymmetricSlot] = {}
        self._captured: dict[int, list[SymmetricSlot]] = {}
        self._side = torch.cuda.Stream(device, priority=-1)

    def slot(self, number: int, size: int) -> SymmetricSlot:
        found = self._slots.get(number)
        if found is None or found.size < size:
            found = self._slots[number] = self._make(number, size)
        kept = self._captured.setdefault(number, [])
        if torch.cuda.is_current_stream_capturing() and found not in kept:
            kept.append(found)
        return found

    def _make(self, number: int, size: int) -> SymmetricSlot:
        import torch.distributed._symmetric_memory as symmetric

        torch.cuda.synchronize(self._device)
        self._slots.pop(number, None)
        buffer = symmetric.empty(-(-size // ALIGN) * ALIGN, dtype=torch.uint8, device=self._device)
        return SymmetricSlot(symmetric.rendezvous(buffer, self._group.group_name), buffer, self._timeout)

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return lambda: torch.cuda.current_stream(self._device).wait_event(event)
