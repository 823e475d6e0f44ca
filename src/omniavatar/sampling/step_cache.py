"""Step caches as plans: which steps run the blocks and which reuse the last residual, known before step 0.

TeaCache and MagCache decide from timesteps and weights alone. So a plan is the same for every window and
every guidance branch, needs no GPU synchronisation, and can be printed and tested on a CPU.

TeaCache adds up `poly(distance)`, an estimate of how much the output changes. The distance is the relative L1
change of the time projection since the previous step. While the sum is below the threshold the step is
skipped; else it runs and the sum restarts. The polynomials are valid only for the distances they were fitted
on: below the first root they are negative, and beyond their peak they fall while the change grows. Then the
sum falls and almost every step is skipped. The guard counts a negative estimate as 0, runs every step with a
distance beyond the peak, and reports this in `StepPlan.notes`. The original has no guard (`guard=False`).
MagCache multiplies magnitude ratios of successive residuals and skips steps while the accumulated error is
small.

What both lose: skipped steps are approximations; the published constants were fitted on plain Wan 2.1.
Sources: TeaCache (arXiv 2411.19108), MagCache (arXiv 2506.09045).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omniavatar.types import StepPlan


def compute_all(num_steps: int) -> StepPlan:
    """The plan without a cache: every step is computed."""
    return StepPlan((True,) * num_steps)


def relative_changes(modulations: np.ndarray) -> np.ndarray:
    """TeaCache distances (N,) float32 of time projections (N, ...) in step order; the first is 0."""
    m = modulations.reshape(len(modulations), -1).astype(np.float32)
    change = np.abs(m[1:] - m[:-1]).mean(axis=1, dtype=np.float32)
    size = np.abs(m[:-1]).mean(axis=1, dtype=np.float32)
    return np.concatenate([np.zeros(1, np.float32), change / size])


def fitted_range(coefficients: Sequence[float]) -> tuple[float, float]:
    """Distances (low, high) between which a TeaCache polynomial is positive and below its last peak."""
    polynomial = np.poly1d(coefficients)
    real_roots = [r.real for r in polynomial.roots if abs(r.imag) < 1e-9 and r.real > 0]
    peaks = [
        p.real
        for p in polynomial.deriv().roots
        if abs(p.imag) < 1e-9 and p.real > 0 and polynomial.deriv(2)(p.real) < 0
    ]
    return min(real_roots, default=0.0), max(peaks, default=float("inf"))


def teacache_plan(
    distances: np.ndarray,
    coefficients: Sequence[float],
    threshold: float,
    protect_first: int = 1,
    protect_last: int = 1,
    guard: bool = True,
    fitted: tuple[float, float] | None = None,
) -> StepPlan:
    """Plan for the given distances (N,) of successive steps.

    - coefficients: highest power first.
    - protect_first, protect_last: first and last steps that always run, at least 1 each.
    - fitted: distances (low, high) that the polynomial was fitted on, if known. The guard then estimates a
      smaller distance as `low`, and runs the step at a larger one.
    """
    num_steps = len(distances)
    estimate = np.poly1d(coefficients)
    low, high = fitted or fitted_range(coefficients)
    smallest = low if fitted and guard else 0.0
    compute, total, below, beyond = [], 0.0, 0, 0
    for step, distance in enumerate(distances):
        protected = step < max(protect_first, 1) or step >= num_steps - max(protect_last, 1)
        run = protected
        if not protected:
            change = float(estimate(max(float(distance), smallest)))
            if guard and distance > high:
                run, beyond = True, beyond + 1
            else:
                if guard and change < 0:
                    change, below = 0.0, below + 1
                total += change
                run = total >= threshold
        if run:
            total = 0.0
        compute.append(run)
    notes = []
    if beyond:
        notes.append(
            f"TeaCache: at {beyond} of {num_steps} steps the time projection changes more than the "
            f"polynomial was fitted for (> {high:.3f}); they run"
        )
    if below:
        notes.append(f"TeaCache: at {below} of {num_steps} steps the estimate is negative; it counts as 0")
    return StepPlan(tuple(compute), "teacache", tuple(notes))


def stretch_ratios(ratios: Sequence[float], num_steps: int) -> np.ndarray:
    """Magnitude ratios for `num_steps` from a calibrated row, by nearest neighbours."""
    if num_steps == 1:
        return np.asarray(ratios[-1:], dtype=np.float64)
    places = np.round(np.arange(num_steps) * ((len(ratios) - 1) / (num_steps - 1))).astype(int)
    return np.asarray(ratios, dtype=np.float64)[places]


def magcache_plan(
    num_steps: int,
    ratios: Sequence[float],
    threshold: float = 0.12,
    max_skip: int = 2,
    retention: float = 0.2,
    protect_first: int = 1,
    protect_last: int = 1,
) -> StepPlan:
    """Plan from magnitude ratios, calibrated with any number of steps.

    - threshold: accumulated error that is allowed.
    - max_skip: most steps skipped in a row.
    - retention: share of the steps, at the start, that always run.
    - protect_first, protect_last: first (at least 1) and last steps that always run.
    """
    row = stretch_ratios(ratios, num_steps)
    # The published loop counts calls of both guidance branches, so it is doubled before rounding down.
    first = max(int(num_steps * 2 * retention) // 2, protect_first, 1)
    compute, product, error, skipped = [], 1.0, 0.0, 0
    for step in range(num_steps):
        run = step < first or step >= num_steps - protect_last
        if not run:
            product *= row[step]
            error += abs(1.0 - product)
            skipped += 1
            run = not (error < threshold and skipped <= max_skip)
        if run:
            product, error, skipped = 1.0, 0.0, 0
        compute.append(run)
    return StepPlan(tuple(compute), "magcache")
