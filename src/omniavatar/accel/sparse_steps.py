"""The blocks of a forward as a sparsity plan says, step by step.

What changes: at a sparse step, each layer attends with the lists of its plan, among tokens in tile order. At
a dense step the blocks run unchanged, in row order, unless a residual is carried from step to step.
What it loses: what the plan leaves out, and rounding.
Cost: lists on the device (`list_bytes`), one set for steps with the same tables; tokens and audio are copied
into another order once a forward.
Sources: see `sampling.sparsity`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omniavatar.accel.attention.sparse import BlockLists, SparseAttentionFn
from omniavatar.accel.sparse_blocks import BoundAttention, OrderedBlocks, SparseBlocks
from omniavatar.model.attention import AttentionFn
from omniavatar.sampling.sparsity import DENSE, SparsityPlan

if TYPE_CHECKING:
    from omniavatar.model.dit import RunBlocks, WanDiT
    from omniavatar.model.layers import BlockInputs

LIST_BYTES = 8
"""Of a listed block: an int32, and another one in the form that flash-attn-4 takes."""


class SparseSteps:
    """Stands in for `WanDiT.run_blocks`, at the step that `step` says.

    - dense: runs the blocks of a dense step.
    - wrap: what else is to be done around the blocks of a sparse step, such as CUDA graphs.
    - spread: makes attention over local tokens of attention over all tokens (sequence parallelism).
    - heads: the heads that this process attends with.
    """

    def __init__(
        self,
        dit: WanDiT,
        plan: SparsityPlan,
        attention: SparseAttentionFn,
        dense: RunBlocks,
        device: torch.device,
        wrap: Callable[[RunBlocks], RunBlocks] = lambda run: run,
        spread: Callable[[AttentionFn], AttentionFn] = lambda attention: attention,
        heads: slice = slice(None),
    ) -> None:
        self.plan, self.step = plan, 0
        self._ordered = OrderedBlocks(dense, plan.shape.order, device)
        bound: dict[bytes, AttentionFn] = {}
        runs: dict[bytes, RunBlocks] = {}

        def of_layer(step: int, layer: int) -> AttentionFn | None:
            kept = plan.kept(step, layer)
            if kept is None:
                return None
            key = plan.table_of[step, layer].tobytes()
            if key not in bound:
                table = torch.from_numpy(np.ascontiguousarray(kept[heads])).to(device)
                lists = BlockLists.of(table, plan.shape.block, plan.shape.tokens)
                bound[key] = spread(BoundAttention(attention, lists))
            return bound[key]

        def of_step(step: int) -> RunBlocks:
            row = plan.table_of[step]
            if (row == DENSE).all():
                return dense
            if row.tobytes() not in runs:
                blocks = SparseBlocks(dit, [of_layer(step, layer) for layer in range(plan.shape.layers)])
                runs[row.tobytes()] = wrap(blocks)
            return runs[row.tobytes()]

        self._runs = [of_step(step) for step in range(plan.shape.steps)]
        self._sparse = set(plan.sparse_steps)

    def __call__(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        return self._runs[self.step](tokens_BLC, inputs)

    def ordered(self, run: RunBlocks, always: bool) -> RunBlocks:
        """`run` on tokens in tile order at a sparse step. always: at dense steps too, for residuals."""
        if not always and self.step not in self._sparse:
            return run
        return self._ordered.around(run)


def list_bytes(plan: SparsityPlan) -> int:
    """Bytes of the lists of a plan on the device, at most, for all heads."""
    shape = plan.shape
    different = {row.tobytes(): row for step in plan.table_of for row in step if (row != DENSE).any()}
    if not different:
        return 0
    longest = plan.longest_rows()
    most = [shape.blocks if (row == DENSE).any() else int(longest[row].max()) for row in different.values()]
    return sum(most) * shape.heads * shape.blocks * LIST_BYTES
