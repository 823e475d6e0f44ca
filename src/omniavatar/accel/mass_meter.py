"""Measures which blocks of the attention matrix hold the softmax, in windows with dense attention.

It takes the place of `ResidualCache` (both are a `PassRunner`). Tokens pass the blocks in tile order, which
changes results by rounding only. Every score is computed once more, in float32; the means go to host memory
layer by layer. A sparse step of the 14B with 30,375 tokens takes about ten times as long as usual.

Shapes: G groups of steps, H heads, Q K blocks of queries and of keys.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from omniavatar.accel.attention.sparse import block_mass
from omniavatar.accel.residual_cache import PassRunner
from omniavatar.accel.sparse_blocks import OrderedBlocks, SparseBlocks
from omniavatar.errors import NumbersError
from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.sampling.passes import Pass
from omniavatar.sampling.sparsity import MassLevels, PlanShape, mass_levels

Sums = NDArray[np.float32]
"""(G, layers, H, Q, K)."""


class MassMeter:
    """Pass `window` to `WindowGenerator` as `make_cache`, call `keep` after each window, read `levels`.

    - shape: of the plan; all passes of a step count alike.
    - dense_steps: first steps that stay dense and are not measured.
    - groups: the other steps are measured in this many groups of consecutive steps.
    """

    def __init__(
        self, dit: WanDiT, shape: PlanShape, dense_steps: int, groups: int, device: torch.device
    ) -> None:
        self._dit, self._shape, self._dense_steps, self._groups = dit, shape, dense_steps, groups
        self._sums = self._zeros()
        self._begun = self._sums
        self._ordered = OrderedBlocks(dit.run_blocks, shape.order, device)

    def window(self, run_blocks: RunBlocks) -> PassRunner:
        """The runner of one window. Masses of a window that was not kept are dropped."""
        self._begun = self._zeros()
        return _WindowMasses(self, run_blocks, self._begun)

    def keep(self) -> None:
        """Keep the masses of the last window."""
        self._sums += self._begun

    @property
    def sums(self) -> Sums:
        """The masses of all kept windows."""
        return self._sums

    def restore(self, sums: Sums) -> None:
        """Go on from the `sums` of an earlier meter of the same model and plan."""
        assert sums.shape == self._sums.shape and sums.dtype == self._sums.dtype
        self._sums = sums

    def levels(self) -> MassLevels:
        """The levels of the mean masses of all kept windows. Raises NumbersError if one is not a mass."""
        if not (self._sums.sum(-1) > 0).all():  # NaN is not above 0 either
            raise NumbersError("block masses of a layer are not finite, or zero; check the weight files")
        levels = np.empty(self._sums.shape, np.uint8)
        for group, layer in np.ndindex(self._sums.shape[:2]):
            levels[group, layer] = mass_levels(self._sums[group, layer])
        return MassLevels(self._shape, levels)

    def group_of(self, step: int) -> int | None:
        """The group of a step; None for a step that is not measured."""
        sparse = self._shape.steps - self._dense_steps
        place = step - self._dense_steps
        return None if place < 0 else place * self._groups // sparse

    def around(self, sums: Sums) -> RunBlocks:
        """The blocks in tile order, with dense attention whose masses are added to `sums` of a group."""
        dense = self._dit.attention
        attentions = [_MeasuredAttention(dense, self._shape.block, each) for each in sums]
        return self._ordered.around(SparseBlocks(self._dit, attentions))

    def _zeros(self) -> Sums:
        shape = self._shape
        return np.zeros(
            (self._groups, shape.layers, shape.heads, shape.blocks, shape.blocks), dtype=np.float32
        )


class _WindowMasses:
    def __init__(self, meter: MassMeter, run_blocks: RunBlocks, sums: Sums) -> None:
        self._meter, self._run_blocks, self._sums = meter, run_blocks, sums

    def runner(self, each: Pass) -> RunBlocks:
        group = self._meter.group_of(each.step)
        if group is None:
            return self._run_blocks
        return self._meter.around(self._sums[group])


class _MeasuredAttention:
    """An `AttentionFn`: the dense one, whose block masses are added to `sums` (H, Q, K)."""

    takes_float8 = False

    def __init__(self, dense: AttentionFn, block: int, sums: Sums) -> None:
        self._dense, self._block, self._sums = dense, block, sums

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        self._sums += block_mass(q_BLHD, k_BLHD, self._block).cpu().numpy()
        return self._dense(q_BLHD, k_BLHD, v_BLHD)
