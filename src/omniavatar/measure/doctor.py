"""`omniavatar doctor`: can this machine run it, and with what. Looks, and changes nothing.

Weights are checked by the presence of the files a configuration names, and memory by the estimate of
`omniavatar plan`; whether a file is whole is found out when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.accel.attention.registry import available_backends, choose_backend
from omniavatar.accel.vae import choose_vae
from omniavatar.config.load import load_config
from omniavatar.config.schema import ModelConfig, OutputConfig, PipelineConfig, RuntimeConfig, VideoConfig
from omniavatar.device import choose_device
from omniavatar.engine.loading import DTYPES
from omniavatar.errors import OmniAvatarError
from omniavatar.measure.machine import codecs, devices, free_disk, free_memory, optional_packages, versions
from omniavatar.media.encoders import choose_encoder, try_nvenc
from omniavatar.plan.estimate import MemoryEstimate, estimate_memory
from omniavatar.plan.preview import missing_files
from omniavatar.plan.run import plan_run

NEEDED_CODECS = ("libx264", "aac")


def examine(configs: Sequence[Path]) -> dict[str, Any]:
    """Everything `doctor` reports; `problems` are one line each, with a remedy."""
    device = choose_device("auto")
    attention = {
        name: {"there": available_backends(device), "auto": choose_backend(device, dtype)}
        for name, dtype in DTYPES.items()
    }
    encoders = codecs()
    size = VideoConfig().sizes[0]
    nvenc = try_nvenc(size)
    rows = [_config(path, device) for path in configs]
    return {
        "command": "doctor",
        "omniavatar": __version__,
        "device": str(device),
        "devices": devices(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "attention": attention,
        "vae": choose_vae("auto", device),
        "optional": optional_packages(),
        "codecs": encoders,
        "encoder": {"auto": choose_encoder("auto", size, lambda _: nvenc), "nvenc": nvenc or "works"},
        "disk": [
            {"folder": str(folder), "free_bytes": free_disk(folder)}
            for folder in (OutputConfig().output_dir, Path("pretrained_models"), RuntimeConfig().text_cache)
        ],
        "memory_auto": {scale: _choice(scale, device) for scale in ("1.3B", "14B")},
        "configs": rows,
        "problems": _problems(encoders, rows),
    }


def _config(path: Path, device: torch.device) -> dict[str, Any]:
    """Whether one configuration's weights are there and fit."""
    try:
        config = load_config(path).config
        missing = missing_files(config.model)
        memory = _estimate(config, device)
    except OmniAvatarError as error:
        return {"config": str(path), "ready": False, "error": str(error)}
    need = memory.device_peak
    fits = memory.placement is not None and (device.type == "cuda" or need <= free_memory(device))
    return {
        "config": str(path),
        "ready": not missing and fits,
        "error": None,
        "missing": [str(each) for each in missing],
        "needs_bytes": need,
        "fits": fits,
        "placed": memory.placement is not None,
        "memory": memory.choice,
    }


def _choice(scale: str, device: torch.device) -> str:
    """What `memory: auto` would choose here for a model with the original's settings."""
    model = ModelConfig.model_validate({"weights": "random", "scale": scale})
    return _estimate(PipelineConfig(model=model), device).choice


def _estimate(config: PipelineConfig, device: torch.device) -> MemoryEstimate:
    plan = plan_run(config, config.video.sizes[0], config.video.sample_rate)
    return estimate_memory(config, plan, device)


def _problems(encoders: Sequence[dict[str, Any]], configs: Sequence[dict[str, Any]]) -> list[str]:
    problems = [
        f"{row['name']}: PyAV's FFmpeg lacks it; reinstall av from its wheel"
        for row in encoders
        if row["name"] in NEEDED_CODECS and not row["there"]
    ]
    for row in configs:
        if row["error"]:
            problems.append(f"{row['config']}: {row['error']}")
        elif row["missing"]:
            more = f" and {len(row['missing']) - 1} more" if len(row["missing"]) > 1 else ""
            problems.append(
                f"{row['config']}: {row['missing'][0]}{more} not on this disk; omniavatar download gets them"
            )
        elif not row["fits"]:
            needs = f"needs about {row['needs_bytes'] / 2**30:.1f} GiB, more than is free"
            remedy = f"{needs}; lower max_tokens or use a smaller model"
            problems.append(f"{row['config']}: {remedy if row['placed'] else row['memory']}")
    return problems
