"""The JSON file beside a finished video."""

from __future__ import annotations

import functools
import platform
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from omniavatar import __version__
from omniavatar.config.identity import flat_values
from omniavatar.device import device_name

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.engine.job import Job
    from omniavatar.engine.models import Models
    from omniavatar.engine.prepare import Planned
    from omniavatar.engine.recorder import Elapsed

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """Peak memory of this process in bytes; `peak_gpu_bytes` is None without CUDA."""
    unit = 1 if sys.platform == "darwin" else 1024
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else None
    return {"peak_gpu_bytes": on_gpu, "peak_host_bytes": host}


@functools.cache
def _version(package: str) -> str:
    """Read once: `importlib.metadata` keeps what it finds at each call while a folder of sys.path changes."""
    return version(package)


def sidecar_values(
    job: Job, made: Planned, models: Models, config: PipelineConfig, encoder: str, elapsed: Elapsed
) -> dict[str, Any]:
    """Content of the sidecar: how the finished video was made, and all that is needed to make it again.

    The video was checked against the plan, so frames and seconds of the plan are those of the file.
    """
    plan, inputs, placement = made.plan, made.inputs, models.residency.placement
    return {
        "output": job.output.name,
        "bytes": job.output.stat().st_size,
        "prompt": inputs.request.prompt,
        "seed": inputs.sampling.seed,
        "frames": plan.frames,
        "windows": len(plan.windows),
        "resumed_windows": job.resumed,
        "seconds": elapsed.seconds(),
        "stages": elapsed.stages(),
        "plan": plan.as_dict(),
        "device": device_name(models.device),
        "processes": models.team.size,
        "threads": torch.get_num_threads(),
        **peak_memory(models.device),
        "attention": models.attention_name,
        "vae": models.vae_name,
        "decoder": config.model.decoder,
        "encoder": encoder,
        "quantize": placement.quantize,
        "memory": placement.memory.as_dict(),
        "config": flat_values(config.model_copy(update={"sampling": inputs.sampling})),
        "fingerprint": job.fingerprint,
        "versions": {
            "omniavatar": __version__,
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
    }
