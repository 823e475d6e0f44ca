"""Distributes guidance branches over groups of ranks; every group gets the velocities of all branches.

The groups exchange velocities, and each rank adds them in the order of the plan, so the result is
bit-identical to that of one group. A branch stays with one group for a whole window, because the residuals of
the step cache do. A group without a branch in a step (outside `guidance_interval`) waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from omniavatar.parallel.peers import Peers
from omniavatar.sampling.passes import Pass, Passes

Predict = Callable[[Pass], Tensor]


def branch_owners(passes: Passes, groups: int) -> dict[str, int]:
    """The group of each branch, by name; the branches of the step with the most passes are assigned first."""
    names: dict[str, None] = {}
    for row in sorted(passes, key=len, reverse=True):
        names |= dict.fromkeys(each.branch.name for each in row)
    return {name: number % groups for number, name in enumerate(names)}


class GuidanceParallel:
    """The part of one rank in guidance parallelism.

    peers: the ranks with the same tokens in the other groups.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def velocities(self, passes: Passes) -> Callable[[Sequence[Pass], Predict, Tensor], list[Tensor]]:
        """A function that returns the velocities of one step's passes in order; `like` has their shape."""
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
                for number in range(len(row)):
                    if groups[number] == group:
                        found[number] = next(everything)
            return [found[number] for number in range(len(row))]

        return of_step
