"""Measured step-cache constants: what is measured, and what is made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.accel.residual_meter import ResidualMeter, compare_residuals
from omniavatar.sampling.cache_constants import CacheConstants, published_constants
from omniavatar.sampling.calibration import (
    ResidualChanges,
    estimated_error,
    fit_teacache,
    shared_ratios,
)
from omniavatar.sampling.guidance import Branch
from omniavatar.sampling.passes import Pass
from omniavatar.sampling.schedule import make_schedule
from omniavatar.sampling.step_cache import compute_all, teacache_plan
from omniavatar.types import StepPlan

# What is measured


@pytest.mark.parametrize("piece", [3, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_are_compared_as_the_papers_say(piece, dtype):
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(1, 20, 8, generator=generator).to(dtype)
    old = (new.float() + 0.3 * torch.randn(1, 20, 8, generator=generator)).to(dtype)
    a, b = new[0].double().numpy(), old[0].double().numpy()
    ratios = np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    wanted = [ratios.mean(), ratios.std(), 1 - cosines.mean(), np.abs(a - b).sum() / np.abs(b).sum()]
    assert compare_residuals(new, old, tokens_a_piece=piece).tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_residual_of_zeros_gives_finite_numbers():
    found = compare_residuals(torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))
    assert torch.isfinite(found).all() and found[3] == 0


def test_the_median_over_windows_of_each_branch_apart():
    meter = ResidualMeter()
    up, down = Branch("positive", "speech", 2.0), Branch("negative", "silence", -1.0)
    for factor in (2.0, 3.0, 10.0):
        sizes = {up.name: 1.0, down.name: 1.0}

        def blocks(tokens, inputs, sizes=sizes):
            return tokens + sizes[inputs]

        cache = meter.window(blocks)
        for step in range(3):
            for branch, growth in ((up, factor), (down, 0.5)):
                run = cache.runner(Pass(step, branch, compute=True, keep=False))
                assert torch.equal(
                    run(torch.ones(1, 4, 8), branch.name), torch.ones(1, 4, 8) + sizes[branch.name]
                )
                sizes[branch.name] *= growth
        meter.keep()
    cache = meter.window(lambda tokens, inputs: tokens + 7.0)  # begun, never finished: does not count
    for step in range(2):
        cache.runner(Pass(step, up, compute=True, keep=False))(torch.ones(1, 4, 8), up.name)
    found = meter.changes()
    assert found[up.name].magnitude_ratios == pytest.approx((1, 3, 3))
    assert found[up.name].changes == pytest.approx((0, 2, 2))
    assert found[down.name].magnitude_ratios == pytest.approx((1, 0.5, 0.5))
    assert found[down.name].cosine_distances == pytest.approx((0, 0, 0), abs=1e-6)


# What is made of it


def row(changes: list[float], ratios: list[float] | None = None) -> ResidualChanges:
    zeros = (0.0,) * len(changes)
    return ResidualChanges(tuple(ratios or [1.0] * len(changes)), zeros, zeros, tuple(changes))


def test_the_ratio_farthest_from_one_counts():
    branches = {"a": row([0] * 3, [1, 0.9, 1.02]), "b": row([0] * 3, [1, 1.05, 0.99])}
    assert shared_ratios(branches) == (1, 0.9, 1.02)


def test_a_polynomial_is_found_again():
    wanted = (-300.0, 60.0, -4.0, 0.5, 0.02)
    distances = np.concatenate([[0.0], np.linspace(0.02, 0.12, 14)])
    changes = np.polyval(wanted, distances)
    fit = fit_teacache(distances.tolist(), {"a": row(changes.tolist()), "b": row(changes.tolist())})
    assert fit.polynomial == pytest.approx(wanted, rel=1e-6) and fit.rms_error < 1e-9
    assert fit.fitted[0] < 0.02 < 0.12 < fit.fitted[1]


@pytest.mark.parametrize(("steps", "degree"), [(2, 0), (4, 1), (10, 3), (50, 4)])
def test_few_steps_get_a_stiffer_curve(steps, degree):
    distances = [0.0, *np.linspace(0.02, 0.1, steps - 1)]
    fit = fit_teacache(distances, {"a": row([0.0, *np.random.default_rng(0).uniform(0.05, 0.2, steps - 1)])})
    assert len(fit.polynomial) == degree + 1 and np.isfinite(fit.polynomial).all()


def test_fitted_range_decides_instead_of_the_polynomials_shape():
    falling = (-1.0, 0.5)
    distances = np.array([0, 0.05, 0.2, 0.2, 0.6, 0.2])
    plan = teacache_plan(distances, falling, 0.35, fitted=(0.1, 0.5))
    # 0.05 counts as 0.1: 0.4 is not below 0.35; 0.2: 0.3 is; 0.6 lies beyond
    assert plan.pattern == "CCsCCC" and "1 of 6" in plan.notes[0]


patterns = st.lists(st.booleans(), min_size=1, max_size=20).map(lambda row: (True, *row))


@given(patterns, st.data())
def test_a_step_more_never_makes_the_estimate_worse(compute, data):
    steps = len(compute)
    changes = data.draw(st.lists(st.floats(0, 1), min_size=steps, max_size=steps))
    branches, schedule = {"a": row(changes), "b": row(changes[::-1])}, make_schedule(steps, 5.0)
    error = estimated_error(StepPlan(compute), branches, schedule)
    step = data.draw(st.integers(0, steps - 1))
    more = (*compute[:step], True, *compute[step + 1 :])
    assert estimated_error(StepPlan(more), branches, schedule) <= error + 1e-12
    assert estimated_error(compute_all(steps), branches, schedule) == 0


def test_estimate_weighs_steps_by_the_noise_they_travel():
    schedule = make_schedule(4, 1.0, (1000.0, 600.0, 500.0, 100.0))
    plan = StepPlan((True, False, False, True))
    assert estimated_error(plan, {"a": row([0, 0.2, 0.3, 0.1])}, schedule) == pytest.approx(
        0.1 * 0.2 + 0.4 * 0.5
    )


def test_digest_is_of_the_numbers_alone():
    one, two = published_constants("1.3B"), published_constants("14B")
    assert one is not None and two is not None and one.digest != two.digest
    assert CacheConstants("else", one.magnitude_ratios, one.polynomial).digest == one.digest
    assert CacheConstants("", one.magnitude_ratios, one.polynomial, (0.0, 1.0)).digest != one.digest
