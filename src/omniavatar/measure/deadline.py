"""The best-looking configuration that makes a video of some minutes before a deadline, on this device.

The parts of a window are timed with the configured model, in its own precision and in float8 (int8 where
float8 is not available). Every combination of the settings of `deadline_axes` is then counted, not run. The
combination with the fewest points that meets the deadline wins; among equals, the fastest. Sizes, overlap,
seed and prompts stay as configured. So do the steps if `timesteps` are given, and the length of the windows
if they are not. Sparse attention is proposed only where attention is configured dense and a fast backend
takes the model. A smaller decoder is named, not proposed: no figure says what it loses. The time of a window
of another length follows from two timed lengths: attention grows with the square.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from omniavatar.assets import pocket
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.measure.benchmark.parts import PartTimer, counts_of, start_costs, window_costs, with_weights
from omniavatar.measure.deadline_axes import (
    Axis,
    faster_presets,
    guidance_intervals,
    precisions,
    sparsities,
    step_caches,
    step_counts,
    vae_runners,
    window_lengths,
    with_settings,
)
from omniavatar.measure.projection import StartCosts, WindowCosts, held_by_writer, video_seconds
from omniavatar.plan.run import RunPlan

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
    for quantize in precisions(config):
        timed = changed(config, runtime={"quantize": quantize})
        axes = Axes.of(timed)
        sparse = {"sparse_attention": "window"} if axes.sparse[1:] else {}
        parts = PartTimer(with_settings(timed, sparse), 2, repeats)
        embedding = embedding or parts.embed_prompt()
        loaded = parts.load()
        measured = _measure(parts, changed(timed, sampling={"step_cache": "none"}), axes, minutes)
        this = {"start": started, "prompt": embedding, "models": loaded, "first_runs": parts.warming}
        loading = max(loading, this, key=lambda each: sum(each.values()))
        choices += count(timed, parts.plan, measured.costs, measured.start, minutes, axes, config)
        del parts
        gc.collect()
        torch.cuda.empty_cache()
    all_loading = sum(loading.values())
    choices = [replace(each, seconds=each.seconds + all_loading) for each in choices]
    found = choose(choices, minutes, deadline, loading, notes)
    return replace(found, notes=(*notes, *untried(config, found.chosen)))


def untried(config: PipelineConfig, chosen: Candidate | None) -> tuple[str, ...]:
    """What is faster and never proposed, for those whom the chosen settings cost something."""
    own_latents = pocket.holds(config.model.vae_path)  # which taehv was not trained for
    if config.model.decoder != "full" or own_latents or (chosen is not None and not chosen.points):
        return ()
    return (
        "not tried: decoder=taehv,decoder_path=taew2_1.pth decodes in about an eighth of the time (H100); "
        "what it loses was never measured; add it to --hp to count with it",
    )


@dataclass(frozen=True)
class Axes:
    """What may be changed.

    - planned: settings that change the plan: each combination is counted. sparse, lengths: two of them.
    - coding: ways to run the VAE. presets: faster ones of the video encoder.
    """

    planned: tuple[Axis, ...]
    sparse: Axis
    lengths: Axis
    coding: Axis
    presets: Axis

    @classmethod
    def of(cls, config: PipelineConfig) -> Axes:
        sparse, lengths = sparsities(config), window_lengths(config)
        planned = step_counts(config), step_caches(config), guidance_intervals(config), sparse, lengths
        return cls(planned, sparse, lengths, vae_runners(config), faster_presets(config))


@dataclass(frozen=True)
class Measured:
    """The timed parts of one precision, for windows of any length.

    - window, start: of the configured settings. tokens, frames: of the timed window, and its new frames.
    - linear: the part of a forward's time that grows with the tokens; attention, with their square.
    - shares, forwards: kept shares, the largest first, and the seconds of a forward with them.
    - coding: decode and encode by the VAE's runner. writing: seconds of a window's encoding by preset.
    """

    window: WindowCosts
    start: StartCosts
    tokens: int
    frames: int
    linear: float
    shares: Sequence[float]
    forwards: Sequence[float]
    coding: Mapping[str, tuple[float, float]]
    writing: Mapping[str, float]

    def costs(self, plan: RunPlan, settings: Mapping[str, Any]) -> WindowCosts:
        """Of a plan's windows with these settings."""
        window, longer = self.window, plan.tokens / self.tokens
        decode, encode = self.coding.get(settings.get("vae", ""), (window.decode, window.encode))
        write = self.writing.get(settings.get("preset", ""), window.write)
        found = replace(
            window,
            forward=self._forward(window.forward, longer),
            skipped_forward=window.skipped_forward * longer,
            decode=decode * longer,
            encode=encode,
            write=write * ((plan.window_length - plan.overlap) / self.frames),
        )
        if plan.sparsity is None or len(self.shares) < 2:
            return found
        taken = np.interp(plan.sparsity.kept_share, self.shares[::-1], self.forwards[::-1])
        return replace(found, sparse_forward=self._forward(float(taken), longer))

    def _forward(self, seconds: float, longer: float) -> float:
        """Of a window `longer` times as long as the timed one. Sparse attention saves on the second part."""
        growing = self.window.forward * self.linear
        return growing * longer + (seconds - growing) * longer**2


def _measure(parts: PartTimer, config: PipelineConfig, axes: Axes, minutes: float) -> Measured:
    """Time everything that the axes need. config: without a step cache."""
    plan = parts.plan(config, minutes * 60)
    window = window_costs(parts.window_timings(plan), plan, config.output)
    start = start_costs(parts.start_timings())
    shares, forwards = [1.0], [window.forward]
    for settings, _ in axes.sparse[1:]:
        thinner = parts.plan(with_settings(config, {**settings, "sparse_attention": "window"}), minutes * 60)
        found = parts.forward_timings(thinner).get("sparse_forward")
        if found is not None and thinner.sparsity is not None:
            shares.append(thinner.sparsity.kept_share)
            forwards.append(found.median)
    linear, coding, writing = 1.0, {}, {}
    for settings, _ in axes.lengths[1:2]:
        other = parts.plan(with_settings(config, settings), minutes * 60)
        linear = linear_part(
            (plan.tokens, window.forward), (other.tokens, parts.forward_timings(other)["forward"].median)
        )
    for settings, _ in axes.coding[1:]:
        timings = parts.coding_timings(plan, settings["vae"])
        coding[settings["vae"]] = timings["decode"].median, timings["encode"].median
    for settings, _ in axes.presets:
        writing[settings["preset"]] = parts.write_timing(plan, settings["preset"]).median
    frames = plan.window_length - plan.overlap
    return Measured(window, start, plan.tokens, frames, linear, shares, forwards, coding, writing)


def linear_part(first: tuple[int, float], second: tuple[int, float]) -> float:
    """The linear part of the first time, if a time is a L + b L^2; from two of (tokens L, seconds)."""
    (tokens, seconds), (others, taken) = first, second
    square = (seconds / tokens - taken / others) / (tokens - others)
    return min(1.0, max(0.0, 1 - square * tokens**2 / seconds))


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


def count(
    config: PipelineConfig,
    plan: Callable[[PipelineConfig, float], RunPlan],
    costs: Callable[[RunPlan, Mapping[str, Any]], WindowCosts],
    start: StartCosts,
    minutes: float,
    axes: Axes,
    configured: PipelineConfig,
) -> Iterator[Candidate]:
    """Every combination, as changes of the `configured` one. config: the same with the timed precision.

    A faster preset of the video encoder is counted only where the model would wait for it.
    """
    quantize = config.runtime.quantize
    other = quantize != configured.runtime.quantize
    precision: dict[str, Any] = {"quantize": quantize} if other else {}
    for combination in itertools.product(*axes.planned):
        changes = {key: value for settings, _ in combination for key, value in settings.items()}
        try:
            counted = plan(with_settings(config, changes), minutes * 60)
        except (ConfigError, CheckpointError):
            continue  # a length without a window, or that a calibrated plan is not for
        counts = counts_of(counted)
        for runner, cost in axes.coding:
            settings = {**precision, **changes, **runner}
            points = float(other) + sum(points for _, points in combination) + cost
            found = costs(counted, settings)
            yield Candidate(settings, points, video_seconds(found, start, counts), counted.forwards)
            for preset, more in axes.presets if held_by_writer(found, counts) else []:
                faster = {**settings, **preset}
                seconds = video_seconds(costs(counted, faster), start, counts)
                yield Candidate(faster, points + more, seconds, counted.forwards)


def _text(value: Any) -> str:
    return f"[{','.join(f'{each:g}' for each in value)}]" if isinstance(value, tuple) else str(value)
