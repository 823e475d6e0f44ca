"""The JSON file beside a finished video."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.engine.job import Job
from omniavatar.media.atomic import atomic_write_json

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Most memory this process has held so far, bytes; `peak_gpu_bytes` is None without CUDA."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else None
    return {"peak_gpu_bytes": on_gpu, "peak_host_bytes": host}


def write_sidecar(job: Job, values: dict[str, Any]) -> None:
    """The JSON beside the video: everything needed to know how it was made, and to make it again."""
    versions = {
        "omniavatar": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    atomic_write_json(job.sidecar, {**values, "versions": versions, "platform": platform.platform()})
