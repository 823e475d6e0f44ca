"""Times one engine in this process, which `benchmarks.peers` starts.

Prints one line of JSON: seconds of each part, peak memory and versions, or the reason why there are none.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.engines.adapter import Sizes

WARM_UP = 2


def load(name: str) -> ModuleType:
    """The adapter: a file, a module of `benchmarks.engines`, or any module. Raises ImportError."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        if spec is None or spec.loader is None or not Path(name).is_file():
            raise ImportError(f"{name}: no such file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    own = f"benchmarks.engines.{name}"
    return importlib.import_module(own if importlib.util.find_spec(own) else name)


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of `repeats` runs after `WARM_UP` others."""
    times = []
    for _ in range(WARM_UP + repeats):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return times[WARM_UP:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(name: str, option: str, sizes: Sizes, wanted: list[str], repeats: int) -> dict[str, Any]:
    """Seconds by part, peak GPU memory, versions."""
    adapter = load(name)
    parts = adapter.build(sizes, option)
    device = sizes.torch_device
    seconds = {part: seconds_of(run, repeats, device) for part, run in parts.items() if part in wanted}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    del parts
    gc.collect()
    return {"seconds": seconds, "peak_gpu_bytes": peak, "versions": versions(adapter)}


def versions(adapter: ModuleType) -> Mapping[str, str | None]:
    """Versions of the packages that the adapter names; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in getattr(adapter, "PACKAGES", ()):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    given = json.loads(sys.argv[1])
    given["sizes"] = Sizes(**{**given["sizes"], "latent": tuple(given["sizes"]["latent"])})
    try:
        found = measure(**given)
    except (ImportError, ValueError, RuntimeError) as error:
        found = {"reason": str(error).splitlines()[0] or type(error).__name__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
