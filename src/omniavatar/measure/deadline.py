"""The best-looking configuration that makes a video of some minutes before a deadline, on this device.

The parts of a window are timed with the configured model, in its own precision and in float8 (int8 where
float8 is not available). Every combination of the settings below is then counted, not run. Which combination
looks better is an order of preference in points, not a measurement: float8 or int8 layers 1; a step cache 1,
2 or 4 by its threshold; guidance on three quarters of the steps 1, on half of them 2; sparse attention 3, 5
or 8 by its density, half of that by a calibrated plan; fewer steps 6 for each halving. Sparse attention is
proposed only where attention is configured dense and a fast backend takes the model. The combination with the
fewest points that meets the deadline wins; among equals, the fastest. Sizes, windows, overlap, seed and
prompts stay as configured, and so do the steps if `timesteps` are given.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from omniavatar.accel.attention.registry import choose_backend
from omniavatar.accel.attention.sparse_registry import choose_sparse
from omniavatar.accel.precision import best_quantize
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, torch_dtype
from omniavatar.errors import CheckpointError, ConfigError, ResourceError
from omniavatar.measure.benchmark.parts import PartTimer, counts_of, start_costs, window_costs, with_weights
from omniavatar.measure.projection import StartCosts, WindowCosts, video_seconds
from omniavatar.plan.preview import find_dit_config
from omniavatar.plan.run import RunPlan, window_shape
from omniavatar.plan.sparsity import find_sparsity

Axis = list[tuple[dict[str, Any], float]]
"""Settings by flat key, with their points; the configuration as it is comes first."""
STEPS = (50, 40, 30, 25, 20, 15, 12, 10, 8)
CACHES = ((0.06, 1), (0.12, 2), (0.24, 4))
INTERVALS = ((0.75, 1), (0.5, 2))
DENSITIES = ((0.5, 3.0), (0.35, 5.0), (0.25, 8.0))
HALVING = 6.0
MARGIN = 0.05
"""Part of the deadline that is left free for the error of the prediction."""
_UNITS = {"h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)")


@dataclass(frozen=True)
class Candidate:
    """One combination of settings (by flat key), its points, and the predicted seconds with loading."""

    settings: Mapping[str, Any]
    points: float
    seconds: float
    forwards: int

    @property
    def override(self) -> str:
        """The settings as one `--hp` value; empty for the unchanged configuration."""
        return ",".join(f"{key}={_text(value)}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Proposal:
    """What was found for one deadline, in seconds.

    loading: what does not grow with the video, the sum of `loading_parts`: the command's start, the embedding
    of a new prompt, loading the models, and what first runs take beyond later ones.
    as_configured: the unchanged configuration. chosen: None where no candidate meets the deadline.
    others: up to three better-looking candidates that miss the deadline, fastest first; if nothing meets it,
    the fastest candidate alone.
    """

    minutes: float
    deadline: float
    loading: float
    loading_parts: Mapping[str, float]
    as_configured: Candidate
    chosen: Candidate | None
    others: tuple[Candidate, ...]
    notes: tuple[str, ...]


def parse_duration(text: str) -> float:
    """Seconds of `20min`, `1h30m`, `90s`, or a bare number of minutes. Raises ConfigError."""
    compact = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", compact):
        seconds = float(compact) * 60
    elif compact and not _PART.sub("", compact).strip():
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(compact))
    else:
        raise ConfigError(f"deadline: {text!r} is not a duration; write 20min, 1h30m or 90s")
    if seconds <= 0:
        raise ConfigError(f"deadline: {text!r} must be above 0; write 20min, 1h30m or 90s")
    return seconds


def propose(
    config: PipelineConfig, minutes: float, deadline: float, repeats: int = 5, started: float = 0.0
) -> Proposal:
    """Time the parts and choose; missing weights are replaced by random ones.

    deadline: seconds. started: seconds a command takes until it begins to load.

    Raises ConfigError, CheckpointError, ResourceError as loading the pipeline does.
    """
    config, note = with_weights(config)
    notes = [note] if note else []
    choices: list[Candidate] = []
    loading: dict[str, float] = {}
    embedding = 0.0
    for quantize in _precisions(config):
        timed = changed(config, runtime={"quantize": quantize})
        sparse = _sparsities(timed)
        parts = PartTimer(_sparse(timed, {"sparse_attention": "window"}) if sparse[1:] else timed, 2, repeats)
        embedding = embedding or parts.embed_prompt()
        loaded = parts.load()
        plain = changed(timed, sampling={"step_cache": "none"})
        base = parts.plan(plain, minutes * 60)
        costs, start = window_costs(parts.window_timings(base)), start_costs(parts.start_timings())
        shares, times = [1.0], [costs.forward]
        for settings, _ in sparse[1:]:
            thinner = parts.plan(_sparse(plain, {**settings, "sparse_attention": "window"}), minutes * 60)
            found = parts.forward_timings(thinner).get("sparse_forward")
            if found is not None and thinner.sparsity is not None:
                shares.append(thinner.sparsity.kept_share)
                times.append(found.median)

        this = {"start": started, "prompt": embedding, "models": loaded, "first_runs": parts.warming}
        loading = max(loading, this, key=lambda each: sum(each.values()))

        def seconds(
            plan: RunPlan,
            costs: WindowCosts = costs,
            start: StartCosts = start,
            shares: list[float] = shares,
            times: list[float] = times,
        ) -> float:
            if plan.sparsity is not None and len(shares) > 1:
                taken = float(np.interp(plan.sparsity.kept_share, shares[::-1], times[::-1]))
                costs = replace(costs, sparse_forward=taken)
            return video_seconds(costs, start, counts_of(plan))

        choices += _count(timed, parts.plan, seconds, minutes, quantize, config.runtime.quantize, sparse)
        del parts
        gc.collect()
        torch.cuda.empty_cache()
    all_loading = sum(loading.values())
    choices = [
        Candidate(each.settings, each.points, each.seconds + all_loading, each.forwards) for each in choices
    ]
    return choose(choices, minutes, deadline, loading, notes)


def choose(
    choices: list[Candidate], minutes: float, deadline: float, loading: Mapping[str, float], notes: list[str]
) -> Proposal:
    """Choose the fewest points within the deadline less its margin."""
    ranked = sorted(choices, key=lambda each: (each.points, each.seconds))
    fitting = [each for each in ranked if each.seconds <= deadline * (1 - MARGIN)]
    chosen = fitting[0] if fitting else None
    limit = math.inf if chosen is None else chosen.points
    missing = sorted((each for each in ranked if each.points < limit), key=lambda each: each.seconds)
    fastest = min(ranked, key=lambda each: each.seconds)
    others = missing[:3] if chosen is not None else [fastest]
    as_configured = next(each for each in ranked if not each.settings)
    total = sum(loading.values())
    return Proposal(minutes, deadline, total, loading, as_configured, chosen, tuple(others), tuple(notes))


def _precisions(config: PipelineConfig) -> list[str]:
    """The configured precision, and the fastest one of this device if that is another."""
    configured = config.runtime.quantize
    best = best_quantize(choose_device(config.runtime.device))
    return [configured] if best is None or configured == best else [configured, best]


def _count(
    config: PipelineConfig,
    plan: Callable[[PipelineConfig, float], RunPlan],
    seconds: Callable[[RunPlan], float],
    minutes: float,
    quantize: str,
    configured: str,
    sparse: Axis | None = None,
) -> Iterator[Candidate]:
    precision = ({}, 0.0) if quantize == configured else ({"quantize": quantize}, 1.0)
    axes = (_steps(config), _caches(config), _intervals(config), sparse or [({}, 0.0)])
    for combination in itertools.product(*axes):
        settings: dict[str, Any] = dict(precision[0])
        points = precision[1]
        for change, cost in combination:
            settings |= change
            points += cost
        thinned = {key: value for key, value in settings.items() if key.startswith("sparse_")}
        sampling = {key: settings[key] for key in settings if key not in ("quantize", *thinned)}
        try:
            counted = plan(_sparse(changed(config, sampling=sampling), thinned), minutes * 60)
        except ConfigError:
            continue
        yield Candidate(settings, points, seconds(counted), counted.forwards)


def _steps(config: PipelineConfig) -> Axis:
    steps = config.sampling.steps
    if config.sampling.timesteps is not None:
        return [({}, 0.0)]
    fewer = [count for count in STEPS if count < steps]
    return [({}, 0.0), *(({"num_steps": count}, HALVING * math.log2(steps / count)) for count in fewer)]


def _caches(config: PipelineConfig) -> Axis:
    sampling = config.sampling
    in_one_size = sampling.causal is not None or config.family.chunk is not None
    if sampling.cache_policy != "none" or sampling.timesteps is not None or in_one_size:
        return [({}, 0.0)]
    return [
        ({}, 0.0),
        *(({"step_cache": "magcache", "magcache_thresh": limit}, float(cost)) for limit, cost in CACHES),
    ]


def _intervals(config: PipelineConfig) -> Axis:
    sampling = config.sampling
    guided = sampling.guidance_scale != 1 or sampling.effective_audio_scale != 1
    if not guided or sampling.guidance_interval != (0.0, 1.0):
        return [({}, 0.0)]
    return [({}, 0.0), *(({"guidance_interval": (0.0, end)}, float(cost)) for end, cost in INTERVALS)]


def _sparsities(config: PipelineConfig) -> Axis:
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
        find_sparsity(_sparse(config, {"sparse_attention": "window"}), shape, dit)
    except (ResourceError, ConfigError):
        return nothing
    name, less = "window", 1.0
    try:
        find_sparsity(_sparse(config, {"sparse_attention": "calibrated"}), shape, dit)
        name, less = "calibrated", 0.5
    except (ConfigError, CheckpointError):
        pass  # no file, or of another model, size or schedule
    return [
        *nothing,
        *(({"sparse_attention": name, "sparse_density": each}, cost * less) for each, cost in DENSITIES),
    ]


def _sparse(config: PipelineConfig, values: Mapping[str, Any]) -> PipelineConfig:
    return changed(config, sparsity=values)


def _text(value: Any) -> str:
    return f"[{','.join(f'{each:g}' for each in value)}]" if isinstance(value, tuple) else str(value)
