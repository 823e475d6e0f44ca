"""Clocks by which stages are timed: the host's, and the timeline of a CUDA device.

While the host runs ahead of a device, the host's clock says how long it took to queue a stage, not to do it.
`DeviceClock` puts a mark into the device's queue instead: a stage lasts from when the device gets to its
beginning until it gets to its end, which for a device with an empty queue is host time. Nobody waits for a
mark until its time is asked for.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments; `queued` says whether a moment may still lie ahead when it is marked."""

    queued: bool

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the later one."""
        ...

    def moment(self, mark: Any) -> float:
        """A mark in seconds of `time.perf_counter`; waits for it."""
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
    """The current stream of one CUDA device; making one waits for the device, to know when it is."""

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
