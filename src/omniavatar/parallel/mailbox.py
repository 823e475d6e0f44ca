"""Memory of other GPUs of this machine, written by copy engines: torch's symmetric memory.

Allocations are made and mapped by all ranks of a group together; each has a pad of signals by which the
GPUs themselves tell each other how far they are. No host and no Python object is in between, and all of it
can be captured in a CUDA graph.
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
    """One rank's GPU: machine (this boot of it, this container), its number, and which numbers it reaches."""

    machine: str
    device: int
    reaches: tuple[int, ...]

    @classmethod
    def of(cls, device: torch.device) -> Reach:
        """Of a CUDA device; any other reaches nothing."""
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
                    f"not all GPUs are in one machine ({one.machine.split()[0]}, {other.machine.split()[0]})"
                )
            if one.device == other.device:
                return f"two processes see their GPU as number {one.device} or share it"
            if other.device not in one.reaches:
                return f"GPU {one.device} cannot write into the memory of GPU {other.device}"
    return None


class SymmetricSlot:
    """See `direct.Slot`."""

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
    """See `direct.Mailbox`. A slot that must grow is made anew by all ranks, who wait for their GPUs first;
    what a CUDA graph has captured stays, for the graph will write there again."""

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
