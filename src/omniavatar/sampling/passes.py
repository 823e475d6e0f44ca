"""The forward passes of each step, known before the first step: guidance interval and step cache combined.

Guidance acts on an interval of the steps. Outside it only the conditional pass (prompt and speech, weight 1)
runs, without text and audio guidance. The interval is given in fractions of the steps, as in diffusers'
guiders: with shift 5 most steps have high noise, so an interval of noise levels would be hard to read. A step
s of N is guided if `floor(low*N) <= s < floor(high*N)`; [0, 1] is every step, two equal numbers are none.
Source: guidance in a limited interval (arXiv 2404.07724), which states its interval in noise levels.

All branches share one step plan. A branch that did not run at the plan's last computed step has no residual
of that step, and its last one is older than the plan allows. So its blocks run at the first step of its
return, also if the plan skips that step, and from then on it follows the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from omniavatar.sampling.guidance import Branch, guidance_branches
from omniavatar.types import StepPlan

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Pass:
    """One branch at one step.

    - compute: True runs the blocks, False reuses the branch's last residual.
    - keep: a later step reuses the residual that the branch has after this step.
    """

    step: int
    branch: Branch
    compute: bool
    keep: bool


Passes = tuple[tuple[Pass, ...], ...]
"""The passes of each step, in order."""


def guided_steps(num_steps: int, interval: tuple[float, float]) -> range:
    """The steps at which guidance acts."""
    low, high = (math.floor(fraction * num_steps + _ROUNDING) for fraction in interval)
    return range(low, high)


def plan_passes(
    step_plan: StepPlan,
    branches: tuple[Branch, ...],
    has_audio: bool,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Passes:
    """The passes of every step. branches: those of a guided step. has_audio: other steps use speech."""
    steps = len(step_plan.compute)
    guided = guided_steps(steps, interval)
    alone = guidance_branches(1.0, None, has_audio)
    at_step = [branches if step in guided else alone for step in range(steps)]
    computed: dict[str, int] = {}
    last_planned = 0
    decided: list[list[tuple[Branch, bool]]] = []
    for step, compute in enumerate(step_plan.compute):
        last_planned = step if compute else last_planned
        row = []
        for branch in at_step[step]:
            run = computed.get(branch.name, -1) < last_planned
            if run:
                computed[branch.name] = step
            row.append((branch, run))
        decided.append(row)
    reused: set[str] = set()
    backwards: list[tuple[Pass, ...]] = []
    for step in reversed(range(steps)):
        backwards.append(tuple(Pass(step, b, run, b.name in reused) for b, run in decided[step]))
        for branch, run in decided[step]:
            if run:
                reused.discard(branch.name)
            else:
                reused.add(branch.name)
    return tuple(reversed(backwards))


def branch_patterns(passes: Passes) -> dict[str, str]:
    """For each branch one letter for each step: C computed, s skipped, - not run."""
    names = dict.fromkeys(each.branch.name for row in passes for each in row)
    letters: dict[str, list[str]] = {name: ["-"] * len(passes) for name in names}
    for step, row in enumerate(passes):
        for each in row:
            letters[each.branch.name][step] = "C" if each.compute else "s"
    return {name: "".join(row) for name, row in letters.items()}


def count_passes(passes: Sequence[Sequence[Pass]]) -> tuple[int, int]:
    """Number of passes that run the blocks, and of those that reuse a residual."""
    every = [each.compute for row in passes for each in row]
    return sum(every), len(every) - sum(every)
