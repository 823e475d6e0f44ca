"""Guidance on part of the steps: the passes of each step, no stale residual, the resulting videos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import adopt_placement, make_pipeline, request
from omniavatar import SamplingParams
from omniavatar.accel.residual_cache import ResidualCache
from omniavatar.config.load import load_config
from omniavatar.errors import ConfigError
from omniavatar.plan.run import plan_run
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import branch_patterns, count_passes, guided_steps, plan_passes
from omniavatar.types import StepPlan

GUIDED = guidance_branches(3.0, None, has_audio=True)


def step_plan(pattern: str) -> StepPlan:
    return StepPlan(tuple(letter == "C" for letter in pattern), "magcache")


def patterns(pattern: str, interval: tuple[float, float], branches=GUIDED) -> dict[str, str]:
    return branch_patterns(plan_passes(step_plan(pattern), branches, True, interval))


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [
        (10, (0.0, 1.0), range(10)),
        (10, (0.0, 0.0), range(0)),
        (10, (0.3, 0.7), range(3, 7)),
        (100, (0.29, 0.58), range(29, 58)),
        (15, (0.0, 0.5), range(7)),
    ],
)
def test_interval_is_fractions_of_the_steps(steps, interval, expected):
    assert list(guided_steps(steps, interval)) == list(expected)


def test_a_branch_that_starts_at_a_skipped_step_computes_it():
    assert patterns("CssCss", (0.5, 1.0)) == {"positive+speech": "CssCss", "negative+silence": "---Css"}
    assert patterns("CssCss", (1 / 6, 1.0)) == {"positive+speech": "CssCss", "negative+silence": "-CsCss"}
    assert patterns("CssCss", (0.0, 0.5)) == {"positive+speech": "CssCss", "negative+silence": "Css---"}


def test_conditional_branch_may_pause_inside_the_interval():
    """Audio scale 0: speech runs only without guidance, so its residual from before must not be reused."""
    silent = guidance_branches(3.0, 0.0, has_audio=True)
    found = patterns("CsssCs", (2 / 6, 3 / 6), silent)
    assert found["positive+speech"] == "Cs-sCs"
    found = patterns("CsCsss", (2 / 6, 3 / 6), silent)
    assert found["positive+speech"] == "Cs-Css"
    assert found["positive+silence"] == "--C---"


@given(
    st.lists(st.booleans(), min_size=1, max_size=30),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from([(3.0, None), (3.0, 0.0), (1.0, 3.0), (4.0, 2.0), (1.0, None)]),
)
def test_a_reused_residual_is_never_older_than_the_plan_allows(compute, interval, scales):
    plan = StepPlan((True, *compute))
    branches = guidance_branches(*scales, has_audio=True)
    passes = plan_passes(plan, branches, True, (min(interval), max(interval)))
    made_at: dict[str, int] = {}
    now = [0]
    cache = ResidualCache(lambda tokens, inputs: tokens + now[0])
    for step, row in enumerate(passes):
        newest = max(s for s in range(step + 1) if plan.compute[s])
        now[0] = step
        for each in row:
            added = cache.runner(each)(torch.zeros(1), None).item()
            if each.compute:
                made_at[each.branch.name] = step
            assert added == made_at[each.branch.name] >= newest
            assert each.compute or not plan.compute[step]


@pytest.mark.parametrize("scales", [(3.0, None), (3.0, 5.0), (1.0, None)])
def test_whole_interval_is_the_step_plan_for_every_branch(scales):
    branches = guidance_branches(*scales, has_audio=True)
    found = patterns("CCsCss", (0.0, 1.0), branches)
    assert found == {branch.name: "CCsCss" for branch in branches}
    passes = plan_passes(step_plan("CCsCss"), branches, True)
    assert [tuple(each.branch for each in row) for row in passes] == [branches] * 6
    assert count_passes(passes) == (3 * len(branches), 3 * len(branches))


def test_plan_counts_the_passes_that_run():
    config = load_config(None, {"num_steps": 10, "guidance_interval": [0.2, 0.7]}).config
    plan = plan_run(config, (400, 720), 16000 * 10, step_plan("CCsCsCsCsC"))
    windows = len(plan.windows)
    assert plan.branch_patterns == {"positive+speech": "CCsCsCsCsC", "negative+silence": "--CCsCs---"}
    assert (plan.forwards, plan.forwards_skipped) == (9 * windows, 6 * windows)
    assert any("5 of 10 steps" in note for note in plan.notes)
    json.dumps(plan.as_dict())


@pytest.mark.parametrize("bad", [[0.5, 0.2], [-0.1, 1], [0, 1.1], [0.5], "half"])
def test_bad_intervals_are_refused(bad):
    with pytest.raises(ConfigError, match="guidance_interval"):
        load_config(None, {"guidance_interval": bad})


@pytest.fixture(scope="module")
def pipeline(nano_checkpoint, tmp_path_factory):
    return make_pipeline(nano_checkpoint, tmp_path_factory.mktemp("text-cache"), num_steps=4)


def video(pipeline, **sampling) -> np.ndarray:
    req = request(0.3, sampling=SamplingParams(**sampling))
    return np.concatenate([chunk.frames for chunk in pipeline.stream(req)])


def test_videos_with_whole_empty_and_half_intervals(pipeline):
    calls = []
    adopt_placement(pipeline, request(0.3))
    blocks = pipeline.models.dit.run_blocks

    def counted(tokens, inputs):
        calls.append(1)
        return blocks(tokens, inputs)

    pipeline.models.dit.run_blocks = counted
    try:
        found, counts = {}, {}
        for name, sampling in {
            "plain": {},
            "whole": {"guidance_interval": (0.0, 1.0)},
            "none": {"guidance_interval": (0.5, 0.5)},
            "unguided": {"guidance_scale": 1.0},
            "half": {"guidance_interval": (0.0, 0.5)},
        }.items():
            calls.clear()
            found[name], counts[name] = video(pipeline, **sampling), len(calls)
    finally:
        del pipeline.models.dit.run_blocks
    assert np.array_equal(found["plain"], found["whole"])
    assert np.array_equal(found["none"], found["unguided"])
    assert not np.array_equal(found["half"], found["whole"])
    assert not np.array_equal(found["half"], found["none"])
    windows = counts["unguided"] // 4
    assert counts == {
        "plain": 8 * windows,
        "whole": 8 * windows,
        "none": 4 * windows,
        "unguided": 4 * windows,
        "half": 6 * windows,
    }


def test_sidecar_records_which_passes_ran(pipeline, tmp_path: Path):
    params = SamplingParams(guidance_interval=(0.25, 0.75))
    result = pipeline.generate(request(0.3, sampling=params), tmp_path / "out.mp4")
    plan = json.loads(result.sidecar.read_text())["plan"]
    assert plan["branch_patterns"] == {"positive+speech": "CCCC", "negative+silence": "-CC-"}
    assert plan["forwards"] == 6 * plan["windows"] and plan["guided"] == 2
