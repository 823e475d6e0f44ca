"""`omniavatar doctor`: what this machine can run, and with which backends. It changes nothing.

Weights are checked by the presence of the files that a configuration names, memory by the estimate of
`omniavatar plan`. A damaged file is found only when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.accel.attention.registry import ATTENTION, choose_backend
from omniavatar.accel.vae_runners import choose_vae
from omniavatar.checkpoint.layout import MERGED, TOKEN_FAMILIES, merged_name
from omniavatar.config.backends import REGISTRIES, registry
from omniavatar.config.load import load_config
from omniavatar.config.schema import ModelConfig, OutputConfig, PipelineConfig, RuntimeConfig, VideoConfig
from omniavatar.device import choose_device, free_disk, torch_dtype
from omniavatar.errors import OmniAvatarError
from omniavatar.measure.machine import codecs, devices, free_memory, optional_packages, versions
from omniavatar.media.h264 import ENCODERS, choose_encoder
from omniavatar.parallel.threads import waiting
from omniavatar.plan.estimate import MemoryEstimate, estimate_memory
from omniavatar.plan.preview import assumed_scale, missing_files, with_family
from omniavatar.plan.run import plan_run
from omniavatar.types import bytes_text

NEEDED_CODECS = ("libx264", "aac")


def examine(configs: Sequence[Path]) -> dict[str, Any]:
    """Everything that `doctor` reports; `problems` are one line each, with a remedy."""
    device = choose_device("auto")
    attention = {
        name: {"available": ATTENTION.available(device), "auto": choose_backend(device, torch_dtype(name))}
        for name in ("bf16", "fp16", "fp32")
    }
    encoders = codecs()
    size = VideoConfig().sizes[0]
    refused = ENCODERS.reasons(size)
    rows = [config_row(path, device) for path in configs]
    return {
        "command": "doctor",
        "omniavatar": __version__,
        "device": str(device),
        "devices": devices(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "attention": attention,
        "waiting_threads": waiting(os.environ),
        "backends": backends(device, size),
        "vae": choose_vae("auto", device),
        "optional": optional_packages(),
        "codecs": encoders,
        "encoder": {"auto": choose_encoder("auto", size), "nvenc": refused["nvenc"] or "works"},
        "disk": [
            {"folder": str(folder), "free_bytes": free_disk(folder)}
            for folder in (OutputConfig().output_dir, Path("pretrained_models"), RuntimeConfig().text_cache)
            if folder is not None
        ],
        "memory_auto": {scale: _choice(scale, device) for scale in ("1.3B", "14B")},
        "configs": rows,
        "problems": _problems(encoders, rows),
        "fetch": fetch_commands(rows),
        "run_now": commands_now(rows),
    }


def backends(device: torch.device, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Every registered backend of every setting. size: (H, W) that video encoders are tried with.

    `reason` says why a backend cannot be used here; it is None for an available one.
    """
    rows = []
    for setting in REGISTRIES:
        found = registry(setting)
        reasons = found.reasons(size if setting == ENCODERS.setting else device)
        for backend in found:
            reason = reasons[backend.name]
            row = {"setting": setting, "name": backend.name, "exact": backend.exact, "doc": backend.doc}
            rows.append({**row, "available": reason is None, "reason": reason})
    return rows


def checkpoint_name(model: ModelConfig) -> str:
    """The name of a model's checkpoint, as `omniavatar download` takes it."""
    scale = assumed_scale(model)
    if model.family in TOKEN_FAMILIES:
        return model.family if scale != "nano" else f"{model.family}-nano"
    return merged_name(model.dit_path) or scale


def config_row(path: Path, device: torch.device) -> dict[str, Any]:
    """Whether the weights of one configuration exist and fit; `ready` says both."""
    try:
        config = with_family(load_config(path).config)
        missing = missing_files(config.model)
        memory = _estimate(config, device)
    except OmniAvatarError as error:
        return {"config": str(path), "ready": False, "error": str(error), "missing": []}
    adapted = config.family.text  # a LoRA of another family is part of its download
    need = memory.device_peak
    fits = memory.placement is not None and (device.type == "cuda" or need <= free_memory(device))
    return {
        "config": str(path),
        "ready": not missing and fits,
        "error": None,
        "missing": [str(each) for each in missing],
        "scale": checkpoint_name(config.model),
        "loras": [str(each.path) for each in config.model.loras if each.path in missing and adapted],
        "needs_bytes": need,
        "fits": fits,
        "placed": memory.placement is not None,
        "memory": memory.choice,
    }


def fetch_commands(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each command that brings missing weights: the configurations that need them, and how many files.

    A LoRA belongs to no command: the comments of its configuration name its source.
    """
    fetched: dict[str, dict[str, Any]] = {}
    for row in rows:
        if not row["missing"]:
            continue
        command = f"omniavatar download {row['scale']}"
        if row["scale"] == "nano":
            command = "omniavatar make-checkpoint --scale nano --out pretrained_models/nano"
        found = fetched.setdefault(command, {"command": command, "configs": [], "files": [], "loras": []})
        found["configs"].append(row["config"])
        found["files"] += [each for each in row["missing"] if each not in (*row["loras"], *found["files"])]
        found["loras"] += [each for each in row["loras"] if each not in found["loras"]]
    return list(fetched.values())


def commands_now(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A command for each ready configuration, the largest model first; the demo, which always works, last."""
    ready = sorted((row for row in rows if row["ready"]), key=lambda row: -row["needs_bytes"])
    image, audio = ("examples/head.png", "examples/speech.flac")
    if not Path(image).is_file():
        image, audio = ("face.jpg", "voice.wav")
    made = [
        f"omniavatar generate --config {row['config']} --image {image} --audio {audio} "
        '--prompt "A person is talking to the camera" --output first.mp4'
        for row in ready
    ]
    return [*made, "omniavatar demo"]


def _choice(scale: str, device: torch.device) -> str:
    """What `memory: auto` chooses on this machine for a model with the original's settings."""
    model = ModelConfig.model_validate({"weights": "random", "scale": scale})
    return _estimate(PipelineConfig(model=model), device).choice


def _estimate(config: PipelineConfig, device: torch.device) -> MemoryEstimate:
    plan = plan_run(config, config.video.sizes[0], config.video.sample_rate)
    return estimate_memory(config, plan, device)


def _problems(encoders: Sequence[dict[str, Any]], configs: Sequence[dict[str, Any]]) -> list[str]:
    problems = [
        f"{row['name']}: PyAV's FFmpeg has no such codec; reinstall av from its wheel"
        for row in encoders
        if row["name"] in NEEDED_CODECS and not row["available"]
    ]
    for row in configs:
        if row["error"]:
            problems.append(f"{row['config']}: {row['error']}")
        elif row["missing"]:
            more = f" and {len(row['missing']) - 1} more" if len(row["missing"]) > 1 else ""
            problems.append(
                f"{row['config']}: {row['missing'][0]}{more} not on this disk; run `omniavatar download`"
            )
        elif not row["fits"]:
            needs = f"needs about {bytes_text(row['needs_bytes'])}, more than is free"
            lower = "causal_window" if row["scale"] in MERGED else "max_tokens"
            remedy = f"{needs}; lower {lower} or use a smaller model"
            problems.append(f"{row['config']}: {remedy if row['placed'] else row['memory']}")
    return problems
