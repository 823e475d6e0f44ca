"""The settings that `plan --deadline` may change, and how many points each loses.

Points are an order of preference, not a measurement: float8 or int8 layers 1; the float8 VAE 0.5; a step
cache 1, 2 or 4 by its threshold; guidance on three quarters of the steps 1, on half of them 2; sparse
attention 3, 5 or 8 by its density, half of that by a calibrated plan; fewer steps 6 for each halving; shorter
windows 1, longer ones 0.5 (they hand over more or less often); a faster preset of the video encoder 0.25 or
0.5 (larger files), only where the encoder would hold back the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omniavatar.accel.attention.registry import choose_backend
from omniavatar.accel.attention.sparse_registry import choose_sparse
from omniavatar.accel.precision import best_quantize
from omniavatar.accel.vae_runners import VAES
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, torch_dtype
from omniavatar.errors import CheckpointError, ConfigError, ResourceError
from omniavatar.media.h264 import PRESETS
from omniavatar.plan.estimate import estimate_memory
from omniavatar.plan.preview import find_dit_config
from omniavatar.plan.run import plan_run, window_shape
from omniavatar.plan.sparsity import find_sparsity

Axis = list[tuple[dict[str, Any], float]]
"""Settings by flat key, with their points; the configuration as it is comes first."""
STEPS = (50, 40, 30, 25, 20, 15, 12, 10, 8)
CACHES = ((0.06, 1), (0.12, 2), (0.24, 4))
INTERVALS = ((0.75, 1), (0.5, 2))
DENSITIES = ((0.5, 3.0), (0.35, 5.0), (0.25, 8.0))
WINDOWS = (15_000, 20_000, 30_000)
"""Tokens of a window that are tried with few steps, if its length is within twice and half the usual one."""
FASTER = (("veryfast", 0.25), ("ultrafast", 0.5))
HALVING = 6.0
FLOAT8_VAE = 0.5
SHORTER, LONGER = 1.0, 0.5
SECTIONS: Mapping[str, str] = {
    "quantize": "runtime", "vae": "runtime", "max_tokens": "video", "preset": "output",
}  # fmt: skip
"""Sections of the settings; sparse ones are in `sparsity`, the others in `sampling`."""


def with_settings(config: PipelineConfig, settings: Mapping[str, Any]) -> PipelineConfig:
    """A copy with settings by flat key."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section = "sparsity" if key.startswith("sparse_") else SECTIONS.get(key, "sampling")
        sections.setdefault(section, {})[key] = value
    return changed(config, **sections)


def precisions(config: PipelineConfig) -> list[str]:
    """The configured precision, and the fastest one of this device if that is another."""
    configured = config.runtime.quantize
    best = best_quantize(choose_device(config.runtime.device))
    return [configured] if best is None or configured == best else [configured, best]


def step_counts(config: PipelineConfig) -> Axis:
    """Fewer steps, unless the timesteps are given."""
    steps = config.sampling.steps
    if config.sampling.timesteps is not None:
        return [({}, 0.0)]
    fewer = [count for count in STEPS if count < steps]
    return [({}, 0.0), *(({"num_steps": count}, HALVING * math.log2(steps / count)) for count in fewer)]


def step_caches(config: PipelineConfig) -> Axis:
    """MagCache, where no step cache is configured."""
    sampling = config.sampling
    in_one_size = sampling.causal is not None or config.family.chunk is not None
    if sampling.cache_policy != "none" or sampling.timesteps is not None or in_one_size:
        return [({}, 0.0)]
    return [
        ({}, 0.0),
        *(({"step_cache": "magcache", "magcache_thresh": limit}, float(cost)) for limit, cost in CACHES),
    ]


def guidance_intervals(config: PipelineConfig) -> Axis:
    """Guidance on a part of the steps, where it is on all of them."""
    sampling = config.sampling
    guided = sampling.guidance_scale != 1 or sampling.effective_audio_scale != 1
    if not guided or sampling.guidance_interval != (0.0, 1.0):
        return [({}, 0.0)]
    return [({}, 0.0), *(({"guidance_interval": (0.0, end)}, float(cost)) for end, cost in INTERVALS)]


def sparsities(config: PipelineConfig) -> Axis:
    """Sparse attention, where it may be proposed; a calibrated plan where this model has one."""
    nothing: Axis = [({}, 0.0)]
    if config.sparsity.sparse_attention != "dense" or config.sampling.causal is not None:
        return nothing
    dit, _ = find_dit_config(config.model)
    device, dtype = choose_device(config.runtime.device), torch_dtype(config.model.dtype)
    attention, width = config.runtime.attention, dit.dim // dit.num_heads
    if attention in ("auto", "fastest"):
        attention = choose_backend(device, dtype)
    try:
        block = config.sparsity.sparse_block_size
        if not choose_sparse("auto", device, dtype, attention, block, width).fast:
            return nothing
        shape = window_shape(config, config.video.sizes[0], bool(dit.audio_dim))
        find_sparsity(with_settings(config, {"sparse_attention": "window"}), shape, dit)
    except (ResourceError, ConfigError):
        return nothing
    name, less = "window", 1.0
    try:
        find_sparsity(with_settings(config, {"sparse_attention": "calibrated"}), shape, dit)
        name, less = "calibrated", 0.5
    except (ConfigError, CheckpointError):
        pass  # no file, or of another model, size or schedule
    return [
        *nothing,
        *(({"sparse_attention": name, "sparse_density": each}, cost * less) for each, cost in DENSITIES),
    ]


def vae_runners(config: PipelineConfig) -> Axis:
    """The float8 VAE, where it runs and the exact one is configured."""
    device, runner = choose_device(config.runtime.device), VAES.get("fp8")
    fits = config.runtime.vae in ("auto", "fast") and config.model.decoder in runner.decoders
    if not fits or config.sampling.causal is not None:
        return [({}, 0.0)]
    if runner.unavailable(device) is not None or not runner.suits(device):
        return [({}, 0.0)]
    return [({}, 0.0), ({"vae": "fp8"}, FLOAT8_VAE)]


def window_lengths(config: PipelineConfig) -> Axis:
    """Windows of other lengths, where a model of few steps can have them; longer ones only if they fit."""
    nothing: Axis = [({}, 0.0)]
    one_size = config.sampling.causal is not None or config.family.chunk is not None
    if config.sampling.timesteps is None or one_size:
        return nothing
    device, audio = choose_device(config.runtime.device), bool(find_dit_config(config.model)[0].audio_dim)
    size = config.video.sizes[0]
    usual = window_shape(config, size, audio).latent_frames
    found, lengths = [*nothing], {usual}
    for tokens in WINDOWS:
        other = changed(config, video={"max_tokens": tokens})
        try:
            length = window_shape(other, size, audio).latent_frames
            if length in lengths or not usual <= 2 * length <= 4 * usual:
                continue
            plan = plan_run(other, size, config.video.sample_rate * 60)
            if length > usual and estimate_memory(other, plan, device).problem is not None:
                continue
        except ConfigError:
            continue  # no window of that length beside the overlap
        lengths.add(length)
        found.append(({"max_tokens": tokens}, LONGER if length > usual else SHORTER))
    return found


def faster_presets(config: PipelineConfig) -> Axis:
    """Presets of the video encoder that are faster than the configured one."""
    order = PRESETS.index(config.output.preset)
    return [({"preset": name}, points) for name, points in FASTER if PRESETS.index(name) < order]
