"""Decides which steps of a run compute the blocks, before the first step, by the configured step cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from omniavatar.config.families import Levels
from omniavatar.config.schema import SamplingConfig
from omniavatar.errors import ConfigError
from omniavatar.sampling.cache_constants import CacheConstants, published_constants
from omniavatar.sampling.schedule import Schedule, distilled_schedule, make_schedule
from omniavatar.sampling.step_cache import compute_all, magcache_plan, relative_changes, teacache_plan
from omniavatar.types import StepPlan

if TYPE_CHECKING:
    import numpy as np


def sampling_schedule(sampling: SamplingConfig, levels: Levels = "even") -> Schedule:
    """The noise levels of the configured steps. levels: of the family."""
    if levels == "even" or sampling.timesteps is not None:
        return make_schedule(sampling.num_steps, sampling.shift, sampling.timesteps)
    return distilled_schedule(sampling.num_steps, sampling.shift, whole=levels == "whole")


def model_scale(configured: str, dim: int) -> str | None:
    """The model whose published constants apply: by the configured scale, else by width `dim`, else None."""
    if configured in ("1.3B", "14B"):
        return configured
    return {1536: "1.3B", 5120: "14B"}.get(dim)


def make_step_plan(
    sampling: SamplingConfig,
    constants: CacheConstants | None,
    time_projections: Callable[[], np.ndarray],
    guard: bool = True,
) -> StepPlan:
    """The plan of the configured step cache.

    - constants: of this model (`plan.calibration.find_constants`).
    - time_projections: returns the schedule's projections (steps, 6, dim) float32; called for TeaCache only.
    - guard: whether TeaCache computes where its polynomial does not hold (`teacache_plan`).

    Raises ConfigError if constants for this model are neither published, measured nor configured.
    """
    policy, steps = sampling.cache_policy, sampling.steps
    constants = needed_constants(sampling, constants)
    if constants is None:
        return compute_all(steps)
    first, last = sampling.cache_protect_first, sampling.cache_protect_last
    if policy == "magcache":
        plan = magcache_plan(
            steps,
            constants.magnitude_ratios,
            sampling.magcache_thresh,
            sampling.magcache_max_skip,
            sampling.magcache_retention,
            first,
            last,
        )
        known = len(constants.magnitude_ratios)
        stretched = f"; ratios of {known} steps stretched to {steps}" if known != steps else ""
        return replace(plan, source=constants.source + stretched)
    distances = relative_changes(time_projections())
    plan = teacache_plan(
        distances,
        constants.polynomial,
        sampling.tea_cache_l1_thresh,
        first,
        last,
        guard,
        constants.fitted,
    )
    return replace(plan, source=constants.source)


def needed_constants(sampling: SamplingConfig, constants: CacheConstants | None) -> CacheConstants | None:
    """The constants that the configured step cache runs with; None without a step cache.

    - constants: of this model (`plan.calibration.find_constants`).

    Raises ConfigError if constants for this model are neither published, measured nor configured.
    """
    policy, configured = sampling.cache_policy, sampling.teacache_coefficients
    if policy == "none":
        return None
    if policy == "magcache":
        if constants is None:
            raise ConfigError(
                "step_cache: MagCache ratios are published for 1.3B and 14B only; "
                "measure this model's with `omniavatar calibrate`, or use none"
            )
        return constants
    if not isinstance(configured, str):
        return CacheConstants("teacache_coefficients of the configuration", (), configured)
    chosen = constants if configured == "auto" else published_constants(configured)
    if chosen is None:
        raise ConfigError(
            "teacache_coefficients: none are published for this model's size; "
            "measure them with `omniavatar calibrate`, give a polynomial, or set tea_cache_l1_thresh=0"
        )
    return chosen
