"""Runs a step plan: skipped steps reuse the residual of the whole block stack.

What changes: at a skipped step the blocks (audio additions included) are replaced by adding the residual
`tokens after - tokens before` of the last computed step, kept apart for every guidance branch. Embedding and
head always run. What it loses: skipped steps are approximations (see sampling.step_cache for the plans).
Source: TeaCache (arXiv 2411.19108), MagCache (arXiv 2506.09045).
"""

from __future__ import annotations

from torch import Tensor

from omniavatar.model.dit import RunBlocks
from omniavatar.model.layers import BlockInputs
from omniavatar.types import StepPlan


class ResidualCache:
    """The residuals of one window; make a new one for each window."""

    def __init__(self, run_blocks: RunBlocks, plan: StepPlan) -> None:
        self._run_blocks = run_blocks
        self._plan = plan
        self._residuals: dict[str, Tensor] = {}

    def runner(self, branch: str, step: int) -> RunBlocks:
        """What stands in for the block stack at this step of this branch."""
        compute = self._plan.compute
        if not compute[step]:
            return lambda tokens, inputs: tokens + self._residuals[branch]
        if step + 1 == len(compute) or compute[step + 1]:
            self._residuals.pop(branch, None)
            return self._run_blocks

        def run_and_keep(tokens: Tensor, inputs: BlockInputs) -> Tensor:
            after = self._run_blocks(tokens, inputs)
            self._residuals[branch] = after - tokens
            return after

        return run_and_keep
