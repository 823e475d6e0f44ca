"""What this machine has: free memory and disk, devices, codecs, optional packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType
from typing import Any

import torch

from omniavatar.accel.pinned import host_memory
from omniavatar.device import installed

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "av", "pydantic")
OPTIONAL: Mapping[str, str] = MappingProxyType(
    {
        "triton": "fused kernels",
        "fa3_fwd_interface": "FlashAttention-3 on Hopper (package fa3-fwd)",
        "sageattention": "SageAttention",
        "flash_attn": "sparse attention on Hopper (package flash-attn-4)",
        "ray": "batches over several GPUs",
    }
)
"""Module: its purpose. None of them is required."""
CODECS: Mapping[str, str] = MappingProxyType(
    {
        "libx264": "every video",
        "aac": "sound in the video",
        "h264_nvenc": "encoding on the GPU (optional)",
    }
)


def free_memory(device: torch.device) -> int:
    """Bytes that a run could take: free on the GPU, or available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()[0]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def optional_packages() -> list[dict[str, Any]]:
    """Optional packages: whether each is installed, its version, its purpose. Nothing is imported."""
    rows = []
    for module, purpose in OPTIONAL.items():
        row = {"name": module, "available": installed(module), "version": _version(module)}
        rows.append({**row, "purpose": purpose})
    return rows


def _version(module: str) -> str | None:
    try:
        return version({"fa3_fwd_interface": "fa3-fwd", "flash_attn": "flash-attn-4"}.get(module, module))
    except PackageNotFoundError:
        return None


def codecs() -> list[dict[str, Any]]:
    """Whether PyAV's FFmpeg has each encoder. A GPU encoder that is built in needs a driver as well."""
    import av.codec

    return [
        {"name": n, "available": n in av.codec.codecs_available, "purpose": why} for n, why in CODECS.items()
    ]


def devices() -> list[dict[str, Any]]:
    """CUDA devices with their memory, and the CPU."""
    available, total = host_memory()
    rows: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        rows.append(
            {
                "name": f"cuda:{index}",
                "model": torch.cuda.get_device_name(index),
                "capability": f"{major}.{minor}",
                "free_bytes": free,
                "total_bytes": whole,
            }
        )
    cpu = {"name": "cpu", "model": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"}
    return [*rows, {**cpu, "capability": platform.machine(), "free_bytes": available, "total_bytes": total}]
