"""What a benchmark prints: a Markdown table, then one line of JSON with the device and the versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence

import torch

from omniavatar.device import choose_device, device_name
from omniavatar.measure.benchmark.summary import table


def where(device: torch.device | None = None) -> dict[str, str | int | None]:
    """Device and versions. device: default the current CUDA device, or the CPU without one."""
    return {
        "device": device_name(choose_device("auto") if device is None else device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def spread(median: float, fastest: float, slowest: float, *, digits: int = 3) -> str:
    """`median (fastest..slowest)`."""
    return f"{median:.{digits}f} ({fastest:.{digits}f}..{slowest:.{digits}f})"


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("\n".join(table(heads, [[str(cell) for cell in row] for row in rows])))


def print_result(benchmark: str, device: torch.device | None = None, **values: object) -> None:
    """Print the result as one line of JSON, device and versions included."""
    print(json.dumps({"benchmark": benchmark, **where(device), **values}))
