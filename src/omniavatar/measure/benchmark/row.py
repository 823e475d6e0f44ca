"""Times the parts of one configuration's window on this machine; `run.py` starts it as a process.

    python -m omniavatar.measure.benchmark.row '{"config": "configs/nano.yaml", "result": "row.json"}'

Measured are a few forwards (computed, skipped, and computed on a shorter window), the decode of one window,
the encode of the hand-over and of the portrait, audio features, and writing. The plan counts the rest. With
`full` it also makes whole videos. Missing weights are replaced by random ones of the same sizes: times stay
the same, pictures mean nothing. A configuration that does not fit the device's memory, or whose forward
would take longer than the limit, is skipped, and the row says why.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omniavatar import __version__
from omniavatar.assets import SPEECH
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.device import choose_device, device_name, torch_dtype
from omniavatar.errors import ConfigError, OmniAvatarError
from omniavatar.measure.benchmark.parts import (
    PartTimer,
    counts_of,
    latent_shape,
    start_costs,
    window_costs,
    with_weights,
)
from omniavatar.measure.benchmark.rows import (
    RANKED_MINUTES,
    FailedRow,
    MeasuredRow,
    Projection,
    Row,
    Setup,
    SkippedRow,
    SparseAttention,
    Versions,
    WholeVideo,
    WindowParts,
    as_dict,
)
from omniavatar.measure.benchmark.tips import PERSISTENT, Tip, fewer_tokens, guide_tips
from omniavatar.measure.benchmark.whole import measure_whole, sparse_quality
from omniavatar.measure.ceilings import ceilings
from omniavatar.measure.flops import forward_work
from omniavatar.measure.machine import free_memory
from omniavatar.measure.peaks import PeakMemory
from omniavatar.measure.projection import StartCosts, Timing, WindowCosts, denoise_seconds, video_seconds
from omniavatar.plan.estimate import estimate_memory
from omniavatar.plan.limit import device_limit
from omniavatar.plan.placement import QUANTIZE_FIELD, place
from omniavatar.plan.preview import assumed_scale, find_dit_config
from omniavatar.plan.run import RunPlan, plan_run
from omniavatar.types import bytes_text

NO_TEACACHE = "TeaCache decides from the weights: with random ones it skips other steps"


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


def measure(options: Options, persistent: int = PERSISTENT) -> Row:
    """The row of one configuration. Raises OmniAvatarError for one that cannot be used.

    persistent: parameters that the tip on streaming leaves on the device.
    """
    config = load_config(options.config, options.overrides).config
    config, missing = with_weights(config)
    device = choose_device(config.runtime.device)
    setup = Setup(
        config=options.config,
        name=Path(options.config).stem,
        model=assumed_scale(config.model),
        weights="random" if config.model.weights == "random" else "files",
        dtype=config.model.dtype,
        device=device_name(device),
        versions=Versions(__version__, torch.__version__, platform.python_version()),
        notes=(missing,) if missing else (),
    )
    reason = _not_possible(config, device, options)
    if reason is not None:
        return SkippedRow(**vars(setup), reason=reason)
    measurement = _Measurement(config, device, options, setup)
    try:
        return measurement.run(persistent)
    except torch.cuda.OutOfMemoryError as error:
        setup = replace(setup, notes=tuple(measurement.notes))
        return SkippedRow(**vars(setup), reason=f"out of GPU memory: {str(error).split('.')[0]}")


def _not_possible(config: PipelineConfig, device: torch.device, options: Options) -> str | None:
    """Why the configuration is not started here, or None."""
    plan = plan_run(config, config.video.sizes[0], config.video.sample_rate)
    memory = estimate_memory(config, plan, device)
    if memory.placement is None:
        return memory.problem
    models = memory.dit + memory.vae + memory.audio_encoder
    need = memory.device_peak if options.full else models + memory.activations
    free = free_memory(device)
    if device.type != "cuda" and need > free:
        return f"needs about {bytes_text(need)}, this machine has {bytes_text(free)} free"
    dit, _ = find_dit_config(config.model)
    limits = ceilings(device, torch_dtype(config.model.dtype))
    least = limits.floor_seconds(forward_work(dit, latent_shape(plan)))
    if least > options.forward_limit:
        return (
            f"one forward would take about {least:,.0f} s on {limits.device} "
            f"({limits.matrix:.2g} TFLOP/s, {limits.source}); limit {options.forward_limit:g} s"
        )
    return None


class _Projector:
    """Projects the seconds of videos from timed parts. costs: by max_tokens."""

    def __init__(self, parts: PartTimer, costs: dict[int, WindowCosts], start: StartCosts) -> None:
        self._parts, self._costs, self._start = parts, costs, start

    def seconds(self, config: PipelineConfig, minutes: float = RANKED_MINUTES) -> float:
        """Seconds of a video. Raises ConfigError where its window was not timed."""
        plan = self._parts.plan(config, minutes * 60)
        costs = self._costs.get(config.video.max_tokens)
        if costs is None:
            raise ConfigError(f"max_tokens: {config.video.max_tokens} leaves no window beside the overlap")
        return video_seconds(costs, self._start, counts_of(plan))

    def projection(self, config: PipelineConfig, minutes: float) -> Projection:
        """Seconds of a video, with the configured step cache and without."""
        windows = len(self._parts.plan(config, minutes * 60).windows)
        baseline = changed(config, sampling={"step_cache": "none"})
        return Projection(minutes, windows, self.seconds(config, minutes), self.seconds(baseline, minutes))

    def use_forward(self, config: PipelineConfig, seconds: float) -> None:
        """From now on count with this time of a forward for the window of `config`."""
        tokens = config.video.max_tokens
        self._costs[tokens] = replace(self._costs[tokens], forward=seconds)


class _Measurement:
    """The models of one configuration and the times of its parts. `notes` grow while it runs."""

    def __init__(self, config: PipelineConfig, device: torch.device, options: Options, setup: Setup) -> None:
        self._config, self._device, self._options, self._setup = config, device, options, setup
        self.notes = list(setup.notes)
        self._parts = PartTimer(config, options.warm_up, options.repeats)
        self._models = self._parts.pipeline.models

    def run(self, persistent: int) -> MeasuredRow:
        """Load, time the parts, project, and try the guide's tips."""
        config, models = self._config, self._models
        loading = self._parts.load()
        plan = self._parts.plan(config, 60.0)
        assert plan.step_plan is not None
        cached = not _unreadable_cache(config)
        if not cached:
            self.notes.append(
                f"{NO_TEACACHE}, so the all-in time is not that of the real model; other tips run without it"
            )
        if plan.step_plan.source:
            self.notes.append(f"step cache by constants {plan.step_plan.source}")
        timings = self._parts.window_timings(plan)
        costs = window_costs(timings, plan, config.output)
        by_tokens = {config.video.max_tokens: costs, **self._shorter_window()}
        start_timings = self._parts.start_timings()
        projector = _Projector(self._parts, by_tokens, start_costs(start_timings))
        row = MeasuredRow(
            **vars(self._setup),
            attention=models.attention_name,
            quantize=models.residency.placement.quantize,
            memory=models.residency.placement.memory.as_dict(),
            vae=models.vae_name,
            decoder=config.model.decoder,
            size=plan.size,
            window_length=plan.window_length,
            tokens=plan.tokens,
            steps=plan.steps,
            computed_steps=plan.step_plan.computed,
            pattern=plan.step_plan.pattern,
            step_cache=plan.step_plan.policy,
            branches=len(plan.branches),
            loading_seconds=loading,
            timings={**timings, **start_timings},
            window=WindowParts(
                denoise_seconds(costs, counts_of(plan)), costs.decode, costs.encode, costs.write
            ),
            projections=tuple(projector.projection(config, minutes) for minutes in self._options.minutes),
            peak_memory=PeakMemory.now(self._device),
            tips=(),
        )
        whole = self._whole(projector)
        tips = self._tips(projector, plan, timings["forward"], cached, persistent)
        sparse = self._sparse(plan)
        if sparse is not None:
            self.notes.append(sparse.text)
        return replace(row, full=whole, sparse=sparse, tips=tips, notes=tuple(self.notes))

    def _shorter_window(self) -> dict[int, WindowCosts]:
        """The costs of the window of `fewer_tokens`; empty, with a note, where it cannot be that short.

        Empty also for models whose blocks or chunks have one size.
        """
        if self._config.sampling.causal is not None or self._config.family.chunk is not None:
            return {}
        shorter = changed(self._config, video={"max_tokens": fewer_tokens(self._config)})
        try:
            plan = self._parts.plan(shorter, 60.0)
            costs = window_costs(self._parts.window_timings(plan), plan, shorter.output)
            return {shorter.video.max_tokens: costs}
        except ConfigError as error:
            self.notes.append(f"no shorter window: {error}")
            return {}

    def _sparse(self, plan: RunPlan) -> SparseAttention | None:
        backend = self._models.sparse
        if plan.sparsity is None or backend is None:
            return None
        files = self._config.model.weights == "files"
        quality = sparse_quality(self._parts.pipeline, SPEECH) if files else None
        return SparseAttention(plan.sparsity.as_dict(), backend.name, quality)

    def _whole(self, projector: _Projector) -> WholeVideo | None:
        if not self._options.full:
            return None
        return measure_whole(
            self._parts.pipeline, SPEECH, lambda audio: projector.seconds(self._config, audio / 60)
        )

    def _tips(
        self, projector: _Projector, plan: RunPlan, forward: Timing, cached: bool, persistent: int
    ) -> tuple[Tip, ...]:
        def seconds(changes: PipelineConfig) -> float:
            if _unreadable_cache(changes):
                raise ConfigError(NO_TEACACHE)
            if changes.runtime != self._config.runtime:
                projector.use_forward(changes, self._forward_elsewhere(changes, plan, forward).median)
            return projector.seconds(changes)

        return tuple(guide_tips(self._config, seconds, cached, persistent))

    def _forward_elsewhere(self, config: PipelineConfig, plan: RunPlan, known: Timing) -> Timing:
        """A forward with the blocks where `config` puts them; `known` if they already lie there."""
        models, residency = self._models, self._models.residency
        limit = device_limit(config.runtime.memory, self._device)
        kept = {QUANTIZE_FIELD: residency.placement.quantize}
        placement = place(config, models.dit_config, plan, models.vae_name, self._device, limit, kept)
        if placement.memory.resident_blocks >= residency.placement.memory.resident_blocks:
            return known
        residency.adopt(placement)
        return self._parts.forward_timings(plan)["forward"]


def _unreadable_cache(config: PipelineConfig) -> bool:
    """Whether the step cache would decide from weights that are not the model's."""
    return config.model.weights == "random" and config.sampling.cache_policy == "teacache"


def main() -> None:
    """Measure as the one argument (JSON of `Options`) says and write the row to its `result`."""
    values: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(sys.argv[1]).items()
    }
    options = Options(**values)
    row: Row
    try:
        row = measure(options)
    except OmniAvatarError as error:
        row = FailedRow(config=options.config, name=Path(options.config).stem, reason=str(error))
    partial = Path(options.result + ".partial")
    partial.write_text(json.dumps(as_dict(row)), encoding="utf-8")
    os.replace(partial, options.result)


if __name__ == "__main__":
    main()
