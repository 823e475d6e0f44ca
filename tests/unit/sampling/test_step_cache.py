import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.accel.residual_cache import ResidualCache
from omniavatar.sampling.cache_constants import MAGCACHE_RATIOS, TEACACHE_POLYNOMIALS
from omniavatar.sampling.guidance import Branch
from omniavatar.sampling.passes import Pass
from omniavatar.sampling.step_cache import (
    compute_all,
    fitted_range,
    magcache_plan,
    relative_changes,
    teacache_plan,
)


def test_relative_change_is_to_the_step_before_even_if_skipped():
    m = np.array([[1.0, -1.0], [1.5, -1.0], [1.5, -2.0]], np.float32)
    assert relative_changes(m).tolist() == pytest.approx([0.0, 0.25, 0.4])


def test_fitted_ranges_of_the_published_polynomials():
    for name, low, high in (("14B", 0.0077, 0.0663), ("1.3B", 0.0043, 0.0792)):
        assert fitted_range(TEACACHE_POLYNOMIALS[name]) == pytest.approx((low, high), abs=2e-4)


def test_skipped_strictly_below_the_threshold():
    distances = np.array([0, 0.1, 0.1, 0.1, 0.1, 0.1])
    plan = teacache_plan(distances, (1.0, 0.0), 0.2, guard=False)
    assert plan.pattern == "CsCsCC"


def test_negative_estimates_do_not_accumulate():
    """Fault of the original: a sum that falls below zero skips almost everything."""
    polynomial = TEACACHE_POLYNOMIALS["14B"]
    distances = np.array([0.0] + [0.09] * 18 + [0.05])
    unguarded = teacache_plan(distances, polynomial, 0.14, guard=False)
    assert unguarded.computed == 2
    guarded = teacache_plan(distances, polynomial, 0.14)
    assert guarded.computed == 20
    assert "18 of 20" in guarded.notes[0]
    small = teacache_plan(np.array([0.0] + [0.001, 0.03] * 6 + [0.03]), polynomial, 0.14)
    assert any("negative" in note for note in small.notes)
    assert (
        small.computed
        > teacache_plan(np.array([0.0] + [0.001, 0.03] * 6 + [0.03]), polynomial, 0.14, guard=False).computed
    )


def test_each_model_has_its_own_polynomial():
    """Fault of the original: the 14B's coefficients used for the 1.3B."""
    distances = np.linspace(0.0, 0.06, 20)
    plans = {name: teacache_plan(distances, p, 0.14).pattern for name, p in TEACACHE_POLYNOMIALS.items()}
    assert plans["1.3B"] != plans["14B"]


@given(
    st.lists(st.floats(0, 0.3), min_size=2, max_size=60),
    st.floats(0.01, 1.0),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(sorted(TEACACHE_POLYNOMIALS)),
)
def test_protected_steps_always_run(distances, threshold, first, last, name):
    plan = teacache_plan(np.array(distances), TEACACHE_POLYNOMIALS[name], threshold, first, last)
    assert len(plan.compute) == len(distances)
    assert all(plan.compute[:first]) and all(plan.compute[-last:])


@pytest.mark.parametrize(
    ("steps", "computed"),
    [
        (50, (25, 21, 19, 18)),
        (40, (20, 17, 15, 14)),
        (25, (12, 11, 9, 9)),
        (16, (8, 7, 6, 5)),
        (12, (6, 5, 4, 4)),
    ],
)
def test_magcache_computes_as_many_steps_as_published_code(steps, computed):
    settings = ((0.12, 2), (0.12, 4), (0.24, 4), (0.24, 6))
    for ratios in MAGCACHE_RATIOS.values():
        counts = tuple(magcache_plan(steps, ratios, t, k, protect_last=0).computed for t, k in settings)
        assert counts == computed


@given(st.integers(2, 60), st.floats(0.01, 0.5), st.integers(1, 8), st.integers(0, 4))
def test_magcache_bounds(steps, threshold, max_skip, last):
    plan = magcache_plan(steps, MAGCACHE_RATIOS["1.3B"], threshold, max_skip, protect_last=last)
    assert plan.compute[0]
    assert max(map(len, plan.pattern.split("C"))) <= max_skip
    assert last == 0 or all(plan.compute[-last:])


def test_branches_keep_their_own_residuals():
    """Fault of the original: the third branch's cache is made anew every step, so it never skips."""
    calls = []

    def blocks(tokens, inputs):
        calls.append(inputs)
        return tokens * 3

    names = ("a", "b", "c")
    branches = {name: Branch("positive", name, 1.0) for name in names}
    cache = ResidualCache(blocks)
    x, y, z = torch.ones(2), torch.full((2,), 5.0), torch.full((2,), 7.0)
    for name, tokens in zip(names, (x, y, z), strict=True):
        cache.runner(Pass(0, branches[name], compute=True, keep=True))(tokens, name)
    assert calls == ["a", "b", "c"]
    for name, tokens in zip(names, (x, y, z), strict=True):
        reused = cache.runner(Pass(1, branches[name], compute=False, keep=name == "a"))
        assert torch.equal(reused(torch.zeros(2), name), tokens * 2)
    assert calls == ["a", "b", "c"]
    assert torch.equal(cache.runner(Pass(2, branches["a"], False, False))(torch.zeros(2), "a"), x * 2)
    cache.runner(Pass(2, branches["c"], compute=True, keep=False))(z, "c again")
    assert calls[-1] == "c again"
    with pytest.raises(KeyError):
        cache.runner(Pass(3, branches["c"], compute=False, keep=False))


def test_no_cache_is_every_step():
    assert compute_all(3).pattern == "CCC"
