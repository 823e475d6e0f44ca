"""From how a model's residuals change between steps to the constants of its step caches.

What is measured, with every step computed, is the residual r_t of the block stack (what a cache reuses):
- magnitude ratio: mean over tokens of |r_t| / |r_(t-1)|, what MagCache multiplies (arXiv 2506.09045);
- change: sum |r_t - r_(t-1)| / sum |r_(t-1)|, what TeaCache estimates from the change of the time projection
  by a polynomial (arXiv 2411.19108). The paper fits the change of the model's output; here it is the
  residual's, since the residual is what a skipped step gets wrong.

A plan is one for all branches. MagCache therefore gets, at each step, the branch whose ratio is farthest
from 1; TeaCache's polynomial is fitted to the points of all branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from omniavatar.sampling.schedule import Schedule
from omniavatar.types import StepPlan

MOST_POWERS = 4
POINTS_A_POWER = 3
MARGIN = 0.01


@dataclass(frozen=True)
class ResidualChanges:
    """One branch's residual against that of the step before, one number a step (the first: 1, 0, 0, 0).

    ratio_spread: standard deviation of the magnitude ratio over tokens. cosine_distances: mean over tokens
    of 1 - cosine.
    """

    magnitude_ratios: tuple[float, ...]
    ratio_spread: tuple[float, ...]
    cosine_distances: tuple[float, ...]
    changes: tuple[float, ...]


@dataclass(frozen=True)
class TeaCacheFit:
    """polynomial: highest power first. fitted: time changes (low, high) it holds for. rms_error: of the
    estimated changes, as a share of their mean."""

    polynomial: tuple[float, ...]
    fitted: tuple[float, float]
    rms_error: float


def shared_ratios(branches: Mapping[str, ResidualChanges]) -> tuple[float, ...]:
    """For each step the branches' magnitude ratio that is farthest from 1."""
    rows = zip(*(branch.magnitude_ratios for branch in branches.values()), strict=True)
    return tuple(max(row, key=lambda ratio: abs(ratio - 1.0)) for row in rows)


def fit_teacache(distances: Sequence[float], branches: Mapping[str, ResidualChanges]) -> TeaCacheFit:
    """Least squares over the steps of all branches, the first step left out.

    distances: relative changes of the time projection, one a step (at least 2). The degree is 4 as in the
    published fits, lower where there are fewer than three times as many steps.
    """
    x = np.tile(np.asarray(distances[1:], np.float64), len(branches))
    y = np.concatenate([branch.changes[1:] for branch in branches.values()])
    degree = min(MOST_POWERS, len(np.unique(x)) // POINTS_A_POWER)
    curve = np.polynomial.Polynomial.fit(x, y, degree, domain=_domain(x))
    error = float(np.sqrt(np.mean((curve(x) - y) ** 2)) / np.mean(y)) if np.any(y) else 0.0
    powers = np.zeros(degree + 1)
    converted = curve.convert().coef
    powers[: len(converted)] = converted
    return TeaCacheFit(
        tuple(float(c) for c in powers[::-1]),
        (float(x.min()) * (1 - MARGIN), float(x.max()) * (1 + MARGIN)),
        error,
    )


def _domain(x: np.ndarray) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def estimated_error(plan: StepPlan, branches: Mapping[str, ResidualChanges], schedule: Schedule) -> float:
    """How wrong a window's residuals are under `plan`, as a share of their size, by the measured changes.

    A skipped step's error is at most the sum of the changes since the last computed one; steps weigh as
    much as the noise level they travel; the mean over branches. Errors that one step hands to the next are
    not in it.
    """
    travelled = [sigma - schedule.next_sigma(step) for step, sigma in enumerate(schedule.sigmas)]
    total = 0.0
    for branch in branches.values():
        since = 0.0
        for compute, change, share in zip(plan.compute, branch.changes, travelled, strict=True):
            since = 0.0 if compute else since + change
            total += since * share
    return total / (sum(travelled) * len(branches))
