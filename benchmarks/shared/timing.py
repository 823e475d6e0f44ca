"""Times a function on a CUDA device: warm-up, synchronisation, repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


def _seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun
