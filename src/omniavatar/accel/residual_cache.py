"""Reuses the residual of the whole block stack in the passes that the plan skips.

What changes: a skipped pass does not run the blocks (audio additions included). It adds the residual
`tokens after - tokens before` of the branch's last computed step. Each guidance branch has its own residual,
kept only while a later step reuses it. Embedding and head always run.
What it loses: skipped passes are approximations (plans: `sampling.step_cache`; branches that pause:
`sampling.passes`).
Source: TeaCache (arXiv 2411.19108), MagCache (arXiv 2506.09045).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from omniavatar.sampling.passes import Pass

if TYPE_CHECKING:
    from omniavatar.model.dit import RunBlocks
    from omniavatar.model.layers import BlockInputs


class PassRunner(Protocol):
    """Provides what runs in place of the block stack in each pass of a window."""

    def runner(self, each: Pass) -> RunBlocks: ...


class ResidualCache:
    """The residuals of one window; make a new one for each window."""

    def __init__(self, run_blocks: RunBlocks) -> None:
        self._run_blocks = run_blocks
        self._residuals: dict[str, Tensor] = {}

    def runner(self, each: Pass) -> RunBlocks:
        """What runs in place of the block stack in this pass."""
        branch = each.branch.name
        if not each.compute:
            residual = self._residuals[branch] if each.keep else self._residuals.pop(branch)
            return lambda tokens, inputs: tokens + residual
        self._residuals.pop(branch, None)
        if not each.keep:
            return self._run_blocks

        def run_and_keep(tokens: Tensor, inputs: BlockInputs) -> Tensor:
            after = self._run_blocks(tokens, inputs)
            self._residuals[branch] = after - tokens
            return after

        return run_and_keep
