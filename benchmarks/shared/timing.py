"""Times a function: warm-up, synchronisation with a CUDA device, repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UP = 2


@dataclass(frozen=True)
class Times:
    """Seconds of repeated runs. `first`: of the very first one, which is part of the warm-up."""

    median: float
    fastest: float
    slowest: float
    first: float

    @property
    def spread(self) -> list[float]:
        """[fastest, slowest]."""
        return [self.fastest, self.slowest]


def require_cuda() -> None:
    """Raise SystemExit where this machine has no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit("error: this benchmark needs a CUDA device, and this machine has none")


def timed(run: Callable[[], object], repeats: int, after_warm_up: Callable[[], None] = lambda: None) -> Times:
    """Seconds of `repeats` runs after `WARM_UP` others. after_warm_up: called once between them."""
    warm_up = [_seconds(run) for _ in range(WARM_UP)]
    after_warm_up()
    times = [_seconds(run) for _ in range(repeats)]
    return Times(statistics.median(times), min(times), max(times), warm_up[0])


def quantile(times: Sequence[float], share: float) -> float:
    """The time that `share` of the times are below."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def synchronize() -> None:
    """Wait for the current CUDA device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    """Count the peak of device memory from now on, with an empty cache; does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """The peak of device memory in GB since `reset_peak`; 0 for a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def _seconds(run: Callable[[], object]) -> float:
    synchronize()
    begun = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begun
