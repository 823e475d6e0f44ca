"""Guidance branches over groups of ranks: each group runs its branches, all of them get every velocity.

Velocities are exchanged, not sums, and each rank adds them in the plan's order: the result is equal to the
bit to one group's. A branch stays with one group for a whole window, since the step cache's residuals do.
What it loses: nothing; a group without a branch at a step (outside `guidance_interval`) waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniavatar.parallel.peers import Peers
from omniavatar.sampling.passes import Pass, Passes

Predict = Callable[[Pass], Tensor]


def branch_owners(passes: Passes, groups: int) -> dict[str, int]:
    """Which group runs each branch; the branches of the fullest step are dealt out first."""
    names: dict[str, None] = {}
    for row in sorted(passes, key=len, reverse=True):
        names |= dict.fromkeys(each.branch.name for each in row)
    return {name: place % groups for place, name in enumerate(names)}


class GuidanceParallel:
    """The share of one rank: `peers` hold the same tokens in the other groups."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def velocities(self, passes: Passes) -> Callable[[Sequence[Pass], Predict, Tensor], list[Tensor]]:
        """A function that gives the velocities of one step's passes, in order; `like` has their shape."""
        owners = branch_owners(passes, self._peers.size)

        def of_step(row: Sequence[Pass], predict: Predict, like: Tensor) -> list[Tensor]:
            groups = [owners[each.branch.name] for each in row]
            counts = [groups.count(group) for group in range(self._peers.size)]
            mine = [
                predict(each) for each, group in zip(row, groups, strict=True) if group == self._peers.index
            ]
            rows = torch.stack(mine) if mine else like.new_empty((0, *like.shape))
            everything = iter(self._peers.gather(rows, counts))
            found: dict[int, Tensor] = {}
            for group in range(self._peers.size):
                for place in range(len(row)):
                    if groups[place] == group:
                        found[place] = next(everything)
            return [found[place] for place in range(len(row))]

        return of_step
