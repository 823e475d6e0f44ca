"""How much of a stretch of time a GPU was busy, from the kernels of a torch.profiler trace.

Kernels on several streams overlap, so their times are united, not added. A copy between host and device is no
kernel; both figures are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]
KERNEL = "kernel"
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Busy:
    """seconds: from the first kernel's start to the last one's end. kernels, with_copies: shares of it.

    gaps: the longest stretches without a kernel, (seconds after the first kernel, seconds long).
    """

    seconds: float
    kernels: float
    with_copies: float
    gaps: tuple[Interval, ...]


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretches of time as disjoint intervals in order; touching ones become one."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def busy(events: Iterable[Mapping[str, Any]], longest: int = 5) -> Busy:
    """Figures of a Chrome trace's `traceEvents` (microseconds). Raises ValueError where it has no kernels."""
    kernels: list[Interval] = []
    copies: list[Interval] = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in (KERNEL, *COPIES):
            start, length = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
            (kernels if event["cat"] == KERNEL else copies).append((start, start + length))
    if not kernels:
        raise ValueError("the trace has no kernels")
    running = united(kernels)
    first, last = running[0][0], running[-1][1]
    inside = [(max(start, first), min(end, last)) for start, end in copies if start < last and end > first]
    gaps = [(before[1] - first, after[0] - before[1]) for before, after in itertools.pairwise(running)]
    return Busy(
        seconds=last - first,
        kernels=_length(running) / (last - first),
        with_copies=_length(united([*running, *inside])) / (last - first),
        gaps=tuple(sorted(gaps, key=lambda gap: -gap[1])[:longest]),
    )


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
