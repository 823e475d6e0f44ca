"""Times the parts of one configuration's window on this machine; run in a process of its own.

    python -m omniavatar.measure.benchmark.row '{"config": "configs/nano.yaml", "result": "row.json"}'

A few forwards (computed, skipped, and computed on a shorter window), one window's decode, the encode of the
hand-over and of the portrait, audio features, and writing; everything else is counted by the plan. With
`full` it also makes whole videos. Missing weights are replaced by random ones of the same sizes: times are
the same, pictures mean nothing. A configuration that does not fit the device's memory, or whose forward
would take longer than the limit, is not run, and the row says why.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, torch_dtype
from omniavatar.engine.sidecar import peak_memory
from omniavatar.errors import ConfigError, OmniAvatarError
from omniavatar.measure.benchmark.parts import (
    PartTimer,
    counts_of,
    latent_shape,
    start_costs,
    window_costs,
    with_weights,
)
from omniavatar.measure.benchmark.tips import PERSISTENT, fewer_tokens, guide_tips
from omniavatar.measure.benchmark.whole import measure_full
from omniavatar.measure.ceilings import ceilings, device_name
from omniavatar.measure.flops import forward_work
from omniavatar.measure.machine import free_memory
from omniavatar.measure.projection import Timing, denoise_seconds, video_seconds
from omniavatar.plan.estimate import estimate_memory
from omniavatar.plan.limit import device_limit
from omniavatar.plan.placement import QUANTIZE_FIELD, place
from omniavatar.plan.preview import assumed_scale, find_dit_config
from omniavatar.plan.run import RunPlan, plan_run

AUDIO_SECONDS = 10
TIP_MINUTES = 5.0
NO_TEACACHE = "TeaCache reads its plan off the weights: with random ones it skips other steps"


@dataclass(frozen=True)
class Options:
    """How one configuration is measured. forward_limit: seconds a forward may be expected to take."""

    config: str
    result: str
    overrides: tuple[str, ...] = ()
    warm_up: int = 2
    repeats: int = 5
    minutes: tuple[float, ...] = (1.0, 5.0, 10.0)
    forward_limit: float = 60.0
    full: bool = False


def measure(options: Options, persistent: int = PERSISTENT) -> dict[str, Any]:
    """The row of one configuration. Raises OmniAvatarError for one that cannot be used.

    persistent: parameters that the tip on streaming leaves on the device.
    """
    config = load_config(options.config, options.overrides).config
    config, missing = with_weights(config)
    device = choose_device(config.runtime.device)
    row: dict[str, Any] = {
        "config": options.config,
        "name": Path(options.config).stem,
        "model": assumed_scale(config.model),
        "weights": "random" if config.model.weights == "random" else "files",
        "dtype": config.model.dtype,
        "device": device_name(device),
        "versions": {
            "omniavatar": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "notes": [missing] if missing else [],
    }
    reason = _not_possible(config, device, options)
    if reason is not None:
        return {**row, "status": "skipped", "reason": reason}
    try:
        measured = _Measurement(config, device, options, row["notes"]).run(persistent)
        return {**row, "status": "measured", **measured}
    except torch.cuda.OutOfMemoryError as error:
        return {**row, "status": "skipped", "reason": f"out of GPU memory: {str(error).split('.')[0]}"}


def _not_possible(config: PipelineConfig, device: torch.device, options: Options) -> str | None:
    """Why the configuration is not worth starting here, or None."""
    plan = plan_run(config, config.video.sizes[0], config.video.sample_rate)
    memory = estimate_memory(config, plan, device)
    if memory.placement is None:
        return memory.problem
    models = memory.dit + memory.vae + memory.audio_encoder
    need = memory.device_peak if options.full else models + memory.activations
    free = free_memory(device)
    if device.type != "cuda" and need > free:
        return f"needs about {need / 2**30:.1f} GiB, this machine has {free / 2**30:.1f} GiB free"
    dit, _ = find_dit_config(config.model)
    limits = ceilings(device, torch_dtype(config.model.dtype))
    least = limits.floor_seconds(forward_work(dit, latent_shape(plan)))
    if least > options.forward_limit:
        return (
            f"one forward would take about {least:,.0f} s on {limits.device} "
            f"({limits.matrix:.2g} TFLOP/s, {limits.source}); limit {options.forward_limit:g} s"
        )
    return None


class _Measurement:
    """The models of one configuration and the times of its parts."""

    def __init__(
        self, config: PipelineConfig, device: torch.device, options: Options, notes: list[str]
    ) -> None:
        self._config, self._device, self._options, self._notes = config, device, options, notes
        self._parts = PartTimer(config, options.warm_up, options.repeats)
        self._models = self._parts.pipeline.models

    def run(self, persistent: int) -> dict[str, Any]:
        config, options, models = self._config, self._options, self._models
        loading = self._parts.load()
        plan = self._parts.plan(config, 60.0)
        cached = not _unreadable_cache(config)
        if not cached:
            self._notes.append(
                f"{NO_TEACACHE}, and the all-in figure is not that of the real model; other tips: without it"
            )
        if plan.step_plan is not None and plan.step_plan.source:
            self._notes.append(f"step cache by constants {plan.step_plan.source}")
        timings = self._parts.window_timings(plan)
        shorter = changed(config, video={"max_tokens": fewer_tokens(config)})
        costs = {config.video.max_tokens: window_costs(timings)}
        try:
            short_plan = self._parts.plan(shorter, 60.0)
            costs[shorter.video.max_tokens] = window_costs(self._parts.window_timings(short_plan))
        except ConfigError as error:
            self._notes.append(f"no shorter window: {error}")
        start_timings = self._parts.start_timings()
        start = start_costs(start_timings)

        def seconds(changes: PipelineConfig, minutes: float = TIP_MINUTES) -> float:
            run_plan = self._parts.plan(changes, minutes * 60)
            if changes.video.max_tokens not in costs:
                raise ConfigError(
                    f"max_tokens: {changes.video.max_tokens} leaves no window beside the overlap"
                )
            return video_seconds(costs[changes.video.max_tokens], start, counts_of(run_plan))

        def tried(changes: PipelineConfig) -> float:
            if _unreadable_cache(changes):
                raise ConfigError(NO_TEACACHE)
            if changes.runtime != config.runtime:
                forward = self._forward_elsewhere(changes, plan, timings["forward"])
                costs[changes.video.max_tokens] = replace(
                    costs[changes.video.max_tokens], forward=forward.median
                )
            return seconds(changes)

        baseline = changed(config, sampling={"step_cache": "none"})
        projections = [
            {
                "minutes": minutes,
                "windows": len(self._parts.plan(config, minutes * 60).windows),
                "seconds": seconds(config, minutes),
                "baseline_seconds": seconds(baseline, minutes),
            }
            for minutes in options.minutes
        ]
        assert plan.step_plan is not None
        counts = counts_of(plan)
        row: dict[str, Any] = {
            "attention": models.attention_name,
            "quantize": models.residency.placement.quantize,
            "memory": models.residency.placement.memory.as_dict(),
            "vae": models.vae_name,
            "decoder": config.model.decoder,
            "size": list(plan.size),
            "window_length": plan.window_length,
            "tokens": plan.tokens,
            "steps": plan.steps,
            "computed_steps": plan.step_plan.computed,
            "pattern": plan.step_plan.pattern,
            "step_cache": plan.step_plan.policy,
            "branches": len(plan.branches),
            "loading_seconds": loading,
            "timings": {name: asdict(value) for name, value in {**timings, **start_timings}.items()},
            "window": {
                "denoise": denoise_seconds(costs[config.video.max_tokens], counts),
                "decode": timings["decode"].median,
                "encode": timings["encode"].median,
                "write": timings["write"].median,
            },
            "projections": projections,
            "peak_memory": peak_memory(self._device),
        }
        if options.full:
            with as_file(files("omniavatar.assets")) as assets:
                voice = assets / "speech.flac"
                row["full"] = measure_full(
                    self._parts.pipeline, voice, lambda audio: seconds(config, audio / 60)
                )
        return {**row, "tips": [tip.as_dict() for tip in guide_tips(config, tried, cached, persistent)]}

    def _forward_elsewhere(self, config: PipelineConfig, plan: RunPlan, known: Timing) -> Timing:
        """A forward with the blocks where `config` puts them; `known`, if that is where they are."""
        models, residency = self._models, self._models.residency
        limit = device_limit(config.runtime.memory, self._device)
        kept = {QUANTIZE_FIELD: residency.placement.quantize}
        placement = place(config, models.dit_config, plan, models.vae_name, self._device, limit, kept)
        if placement.memory.resident_blocks >= residency.placement.memory.resident_blocks:
            return known
        residency.adopt(placement)
        return self._parts.forward_timings(plan)["forward"]


def _unreadable_cache(config: PipelineConfig) -> bool:
    """Whether the steps that the step cache skips would be read off weights that are not the model's."""
    return config.model.weights == "random" and config.sampling.cache_policy == "teacache"


def main() -> None:
    """Measure what the one argument (JSON of `Options`) asks for and write the row to its `result`."""
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(sys.argv[1]).items()
    }
    options = Options(**values)
    try:
        row = measure(options)
    except OmniAvatarError as error:
        row = {
            "config": options.config,
            "name": Path(options.config).stem,
            "status": "failed",
            "reason": str(error),
        }
    partial = Path(options.result + ".partial")
    partial.write_text(json.dumps(row), encoding="utf-8")
    os.replace(partial, options.result)


if __name__ == "__main__":
    main()
