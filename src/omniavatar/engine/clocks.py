"""Clocks that time stages: the host's, and the timeline of a CUDA device.

While the host runs ahead of a device, the host's clock shows how long queueing a stage took, not running it.
`DeviceClock` puts marks into the device's queue instead: a stage lasts from when the device reaches its first
mark until it reaches its last. If the queue is empty, this is host time. Only reading a mark waits for it.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments.

    - queued: whether a mark may lie in the future, because the device has not reached it.
    """

    queued: bool

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the later one."""
        ...

    def moment(self, mark: Any) -> float:
        """The time of a mark on the scale of `time.perf_counter`; waits for the mark."""
        ...


class HostClock:
    """The wall clock of this process."""

    queued = False

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def moment(self, mark: float) -> float:
        return mark


class DeviceClock:
    """The current stream of one CUDA device.

    The constructor waits for the device once, to relate its timeline to the host's.
    """

    queued = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._made, self._origin = self.mark(), time.perf_counter()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def moment(self, mark: torch.cuda.Event) -> float:
        return self._origin + self.seconds(self._made, mark)
