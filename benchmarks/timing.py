"""How seconds are measured on a CUDA device: warm-up, synchronisation, repeats; and where they were."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

WARM_UP = 2


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs after the warm-up."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def where() -> dict[str, str]:
    """Device and versions, for the line of JSON."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
