"""Times the parts of one configuration's window on this machine; run in a process of its own.

    python -m omniavatar.benchmarking.measure '{"config": "configs/nano.yaml", "result": "row.json"}'

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
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omniavatar import __version__
from omniavatar.benchmarking.full import measure_full, packaged_portrait
from omniavatar.benchmarking.tips import changed, fewer_tokens, guide_tips
from omniavatar.components import DTYPES, choose_device
from omniavatar.config import PipelineConfig
from omniavatar.config_load import load_config
from omniavatar.encoders.image import prepare_image
from omniavatar.errors import ConfigError, OmniAvatarError
from omniavatar.generation import to_uint8
from omniavatar.machine import free_memory
from omniavatar.media.encoders import choose_encoder
from omniavatar.media.video import encode_segment
from omniavatar.memory import estimate_memory
from omniavatar.output import ENCODER_THREADS, peak_memory
from omniavatar.pipeline import AvatarPipeline
from omniavatar.placement import QUANTIZE_FIELD, Request, device_limit, place
from omniavatar.plan import RunPlan, make_plan
from omniavatar.profiling.ceilings import ceilings, device_name
from omniavatar.profiling.flops import forward_work
from omniavatar.profiling.projection import (
    Counts,
    StartCosts,
    Timing,
    WindowCosts,
    denoise_seconds,
    video_seconds,
)
from omniavatar.profiling.report import decoded_latents
from omniavatar.weights_preview import assumed_scale, find_dit_config, missing_files

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


def measure(options: Options) -> dict[str, Any]:
    """The row of one configuration. Raises OmniAvatarError for one that cannot be used."""
    config = load_config(options.config, options.overrides).config
    missing = missing_files(config.model)
    if missing:
        scale = assumed_scale(config.model)
        config = changed(config, model={"weights": "random", "scale": scale, "loras": ()})
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
        "notes": [f"weights are not on this disk ({missing[0]}): random ones"] if missing else [],
    }
    reason = _not_possible(config, device, options)
    if reason is not None:
        return {**row, "status": "skipped", "reason": reason}
    try:
        return {**row, "status": "measured", **_Measurement(config, device, options, row["notes"]).run()}
    except torch.cuda.OutOfMemoryError as error:
        return {**row, "status": "skipped", "reason": f"out of GPU memory: {str(error).split('.')[0]}"}


def _not_possible(config: PipelineConfig, device: torch.device, options: Options) -> str | None:
    """Why the configuration is not worth starting here, or None."""
    plan = make_plan(config, config.video.sample_rate, config.video.sizes[0])
    memory = estimate_memory(config, plan, has_audio=True, device=device)
    if memory.placement is None:
        return memory.problem
    models = memory.dit + memory.vae + memory.audio_encoder
    need = memory.device_peak if options.full else models + memory.activations
    free = free_memory(device)
    if device.type != "cuda" and need > free:
        return f"needs about {need / 2**30:.1f} GiB, this machine has {free / 2**30:.1f} GiB free"
    dit, _ = find_dit_config(config.model)
    limits = ceilings(device, DTYPES[config.model.dtype])
    least = limits.floor_seconds(forward_work(dit, _latent(plan)))
    if least > options.forward_limit:
        return (
            f"one forward would take about {least:,.0f} s on {limits.device} "
            f"({limits.matrix:.2g} TFLOP/s, {limits.source}); limit {options.forward_limit:g} s"
        )
    return None


def _latent(plan: RunPlan) -> tuple[int, int, int]:
    return plan.latent_frames, plan.size[0] // 8, plan.size[1] // 8


class _Measurement:
    """The models of one configuration and the times of its parts."""

    def __init__(
        self, config: PipelineConfig, device: torch.device, options: Options, notes: list[str]
    ) -> None:
        self._config, self._device, self._options, self._notes = config, device, options, notes
        self._size = config.video.sizes[0]
        self._pipeline = AvatarPipeline.from_config(config)
        self._components = self._pipeline.components

    def run(self) -> dict[str, Any]:
        config, options, components = self._config, self._options, self._components
        whole = make_plan(config, config.video.sample_rate, self._size)
        components.adopt(components.place(Request(whole, config.sampling.cache_policy != "none"), {}))
        begun = time.perf_counter()
        components.dit, components.vae, components.audio_encoder  # noqa: B018  (loads them)
        self._wait()
        loading = time.perf_counter() - begun
        plan = self._plan(config, 60.0)
        if config.model.weights == "random" and config.sampling.cache_policy == "teacache":
            self._notes.append(f"{NO_TEACACHE}, and the all-in figure is not that of the real model")
        if plan.step_plan is not None and plan.step_plan.source:
            self._notes.append(f"step cache by constants {plan.step_plan.source}")
        timings = self._window_timings(plan)
        shorter = changed(config, video={"max_tokens": fewer_tokens(config)})
        costs = {config.video.max_tokens: _costs(timings)}
        try:
            costs[shorter.video.max_tokens] = _costs(self._window_timings(self._plan(shorter, 60.0)))
        except ConfigError as error:
            self._notes.append(f"no shorter window: {error}")
        start_timings = self._start_timings()
        start = StartCosts(
            start_timings["portrait"].median, start_timings["audio_features"].median / AUDIO_SECONDS
        )

        def seconds(changes: PipelineConfig, minutes: float = TIP_MINUTES) -> float:
            run_plan = self._plan(changes, minutes * 60)
            if changes.video.max_tokens not in costs:
                raise ConfigError(
                    f"max_tokens: {changes.video.max_tokens} leaves no window beside the overlap"
                )
            return video_seconds(costs[changes.video.max_tokens], start, counts_of(run_plan))

        def tried(changes: PipelineConfig) -> float:
            if changes.model.weights == "random" and changes.sampling.cache_policy == "teacache":
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
                "windows": len(self._plan(config, minutes * 60).windows),
                "seconds": seconds(config, minutes),
                "baseline_seconds": seconds(baseline, minutes),
            }
            for minutes in options.minutes
        ]
        assert plan.step_plan is not None
        counts = counts_of(plan)
        row: dict[str, Any] = {
            "attention": components.attention_name,
            "quantize": components.quantize,
            "memory": components.placed.memory.as_dict(),
            "vae": components.vae_name,
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
                row["full"] = measure_full(self._pipeline, voice, lambda audio: seconds(config, audio / 60))
        return {**row, "tips": [tip.as_dict() for tip in guide_tips(config, tried)]}

    def _forward_elsewhere(self, config: PipelineConfig, plan: RunPlan, known: Timing) -> Timing:
        """A forward with the blocks where `config` puts them; `known`, if that is where they are."""
        components = self._components
        request = Request(plan, config.sampling.cache_policy != "none")
        limit = device_limit(config.runtime.memory, self._device)
        kept = {QUANTIZE_FIELD: components.quantize}
        dit, vae = components.dit_config, components.vae_name
        placement = place(config, dit, request, vae, self._device, limit, kept)
        if placement.memory.resident_blocks >= components.placed.memory.resident_blocks:
            return known
        components.adopt(placement)
        return self._forward_timings(plan)["forward"]

    def _plan(self, config: PipelineConfig, audio_seconds: float) -> RunPlan:
        video = config.video
        samples = round((audio_seconds + video.silence_duration_s) * video.sample_rate)
        constants = self._components.cache_constants(config.sampling)
        step_plan = self._components.step_plan(config.sampling, constants)
        return make_plan(config, samples, self._size, step_plan=step_plan)

    def _noise(self, *sizes: int) -> Tensor:
        return torch.randn(
            *sizes, generator=torch.Generator(self._device).manual_seed(0), device=self._device
        )

    @torch.inference_mode()
    def _forward_timings(self, plan: RunPlan) -> dict[str, Timing]:
        """A computed forward and a skipped one, of a window of `plan`."""
        dit, shape, noise = self._components.dit, _latent(plan), self._noise
        sample, y = noise(1, 16, *shape), noise(1, 17, *shape)
        text = dit.prepare_text(noise(1, 512, dit.config.text_dim))
        width = dit.config.audio_dim
        audio = dit.prepare_audio(noise(1, plan.window_length, width) if width else None)
        timestep = torch.tensor([800.0], device=self._device)
        residual: list[Tensor] = []

        def skip(tokens: Tensor, _: object) -> Tensor:
            if not residual:
                residual.append(torch.zeros_like(tokens))
            return tokens + residual[0]

        return {
            "forward": self._timed(lambda: dit(sample, y, timestep, text, audio)),
            "skipped_forward": self._timed(lambda: dit(sample, y, timestep, text, audio, run_blocks=skip)),
        }

    @torch.inference_mode()
    def _window_timings(self, plan: RunPlan) -> dict[str, Timing]:
        """Forward, skipped forward, decode, encode and write of a window of `plan`."""
        vae, noise = self._components.vae, self._noise
        sample = noise(1, 16, *_latent(plan))
        frames = _moving_portrait(plan.size, plan.window_length - plan.overlap)
        tail = noise(1, 3, plan.overlap, *plan.size).clamp_(-1, 1)

        def decode() -> None:
            for piece in vae.decode_stream(sample):
                to_uint8(piece.add_(1.0).div_(2.0).clamp_(0.0, 1.0))

        with tempfile.TemporaryDirectory(prefix="omniavatar-") as folder:
            output = self._config.output
            encoder = choose_encoder(output.encoder, plan.size)

            def write() -> None:
                encode_segment(
                    iter([frames]),
                    Path(folder) / "segment.mp4",
                    fps=Fraction(plan.fps),
                    size=plan.size,
                    crf=output.crf,
                    preset=output.preset,
                    threads=ENCODER_THREADS,
                    encoder=encoder,
                )

            return {
                **self._forward_timings(plan),
                "decode": self._timed(decode),
                "encode": self._timed(lambda: vae.encode(tail)),
                "write": self._timed(write),
            }

    @torch.inference_mode()
    def _start_timings(self) -> dict[str, Timing]:
        video = self._config.video
        pixels = prepare_image(packaged_portrait(self._size), self._size).to(self._device)[:, :, None]
        wave = np.random.default_rng(0).standard_normal(AUDIO_SECONDS * video.sample_rate).astype(np.float32)
        with tempfile.TemporaryDirectory(prefix="omniavatar-") as folder:
            out = Path(folder) / "features.npy"
            frames = AUDIO_SECONDS * video.fps
            return {
                "portrait": self._timed(lambda: self._components.vae.encode(pixels)),
                "audio_features": self._timed(
                    lambda: self._components.audio_encoder.encode(wave * 0.1, frames, video.fps, out)
                ),
            }

    def _timed(self, run: Callable[[], object]) -> Timing:
        for _ in range(self._options.warm_up):
            run()
        times = []
        for _ in range(self._options.repeats):
            self._wait()
            begun = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - begun)
        return Timing.of(times)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def counts_of(plan: RunPlan) -> Counts:
    """What the projection needs of a plan whose steps are known."""
    assert plan.step_plan is not None
    windows = len(plan.windows)
    last = decoded_latents(plan.windows[-1], last=True) / plan.latent_frames
    computed, skipped = plan.forwards // windows, plan.forwards_skipped // windows
    return Counts(windows, computed, skipped, last, plan.duration_s)


def _costs(timings: dict[str, Timing]) -> WindowCosts:
    return WindowCosts(**{name: timing.median for name, timing in timings.items()})


def _moving_portrait(size: tuple[int, int], count: int) -> np.ndarray:
    """(count, H, W, 3) uint8: the packaged portrait drifting sideways, about as hard to encode as a face."""
    still = packaged_portrait(size)
    return np.stack([np.roll(still, shift, axis=1) for shift in range(count)])


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
