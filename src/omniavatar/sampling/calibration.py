"""Constants of step caches from measured changes of a model's residual between steps.

The residual r_t of the block stack (what a cache reuses) is measured with every step computed:
- magnitude ratio: mean over tokens of |r_t| / |r_(t-1)|, which MagCache multiplies (arXiv 2506.09045);
- change: sum |r_t - r_(t-1)| / sum |r_(t-1)|, which TeaCache estimates by a polynomial of the change of the
  time projection (arXiv 2411.19108). The paper fits the change of the model's output. Here the residual's is
  fitted, since a skipped step has an error in the residual.

All branches share one plan. So MagCache takes, at each step, the ratio farthest from 1 of all branches, and
TeaCache's polynomial is fitted to the points of all branches.
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
    """A branch's residual compared with that of the previous step: a number a step (first: 1, 0, 0, 0).

    - ratio_spread: standard deviation of the magnitude ratio over tokens.
    - cosine_distances: mean over tokens of 1 - cosine.
    """

    magnitude_ratios: tuple[float, ...]
    ratio_spread: tuple[float, ...]
    cosine_distances: tuple[float, ...]
    changes: tuple[float, ...]


@dataclass(frozen=True)
class TeaCacheFit:
    """A fitted TeaCache polynomial.

    - polynomial: highest power first.
    - fitted: time changes (low, high) for which it is valid.
    - rms_error: error of the estimated changes, as a share of their mean.
    """

    polynomial: tuple[float, ...]
    fitted: tuple[float, float]
    rms_error: float


def shared_ratios(branches: Mapping[str, ResidualChanges]) -> tuple[float, ...]:
    """For each step the magnitude ratio farthest from 1 of all branches."""
    rows = zip(*(branch.magnitude_ratios for branch in branches.values()), strict=True)
    return tuple(max(row, key=lambda ratio: abs(ratio - 1.0)) for row in rows)


def fit_teacache(distances: Sequence[float], branches: Mapping[str, ResidualChanges]) -> TeaCacheFit:
    """Least-squares fit over the steps of all branches, without the first step.

    distances: relative changes of the time projection, one for each step (at least 2). The degree is 4 as in
    the published fits, or a third of the number of steps if that is less.
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
    """Estimated error of a window's residuals under `plan`, as a share of their size: a mean over branches.

    The error of a skipped step is at most the sum of the measured changes since the last computed step. Steps
    are weighted by the noise level that they remove. Errors that a step passes on to the next are not
    included.
    """
    travelled = [sigma - schedule.next_sigma(step) for step, sigma in enumerate(schedule.sigmas)]
    total = 0.0
    for branch in branches.values():
        since = 0.0
        for compute, change, share in zip(plan.compute, branch.changes, travelled, strict=True):
            since = 0.0 if compute else since + change
            total += since * share
    return total / (sum(travelled) * len(branches))
