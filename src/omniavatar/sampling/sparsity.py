"""Which blocks of the attention matrix are computed: plans by name, pure numbers.

A plan says for each step, layer and head which blocks of keys each block of queries attends to. Blocks are
runs of `block` consecutive tokens of a `TokenOrder`; the last one may be shorter.
- dense: all of them.
- window: the nearest in time and space, and the blocks of the first latent frame, which shows the portrait.
  It needs no measurement, and is the same for every layer and head.
- calibrated: for each block of queries the fewest blocks whose share of the softmax, as measured with every
  block computed, reaches a stated one.
Steps may stay dense: with no dense early step a video is no longer the one that dense attention makes.
Sources: SpargeAttention (arXiv 2502.18137), Sliding Tile Attention (arXiv 2502.04507), Sparse VideoGen
(arXiv 2502.01776).

Shapes: Q K blocks of queries and of keys (equal), H heads, U different tables, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from omniavatar.sampling.token_order import TokenOrder

Name = Literal["dense", "window", "calibrated"]
Kept = NDArray[np.bool_]
DENSE = -1
FRAME_DISTANCE = 2.0
"""How many rows or columns apart two tokens count as that are one latent frame apart."""


@dataclass(frozen=True)
class PlanShape:
    """What a plan is for. tokens: L. block: tokens of a block."""

    steps: int
    layers: int
    heads: int
    tokens: int
    block: int

    @property
    def blocks(self) -> int:
        return math.ceil(self.tokens / self.block)

    @property
    def block_tokens(self) -> NDArray[np.int64]:
        """Tokens of each block."""
        return np.diff(np.append(np.arange(0, self.tokens, self.block), self.tokens))


@dataclass(frozen=True, eq=False)
class SparsityPlan:
    """Kept blocks, one bit each, with equal tables stored once.

    tables: (U, Q, ceil(K/8)) uint8, a row's first block in the highest bit of its first byte.
    table_of: (steps, layers, H) int32, the table of each head, or DENSE.
    """

    name: Name
    shape: PlanShape
    tables: NDArray[np.uint8]
    table_of: NDArray[np.int32]

    def kept(self, step: int, layer: int) -> Kept | None:
        """(H, Q, K), or None where every head is dense."""
        chosen = self.table_of[step, layer]
        if (chosen == DENSE).all():
            return None
        kept = np.ones((len(chosen), self.shape.blocks, self.shape.blocks), bool)
        kept[chosen != DENSE] = _unpacked(self.tables[chosen[chosen != DENSE]], self.shape.blocks)
        return kept

    def shares(self) -> NDArray[np.float64]:
        """The share of the attention matrix that each step, layer and head computes, counted in tokens."""
        sizes = self.shape.block_tokens / self.shape.tokens
        shares = [sizes @ _unpacked(table, self.shape.blocks) @ sizes for table in self.tables]
        return np.array([*shares, 1.0])[self.table_of]


def dense_plan(shape: PlanShape) -> SparsityPlan:
    """Every block of every step."""
    table_of = np.full((shape.steps, shape.layers, shape.heads), DENSE, np.int32)
    return SparsityPlan("dense", shape, _packed(np.empty((0, shape.blocks, shape.blocks), bool)), table_of)


def window_plan(
    shape: PlanShape,
    order: TokenOrder,
    share: float,
    dense_steps: Collection[int] = (),
    frame_distance: float = FRAME_DISTANCE,
) -> SparsityPlan:
    """A share of the blocks: those nearest to each block of queries, and the first latent frame's."""
    _check(shape, share, dense_steps)
    table = nearest_blocks(order, shape.block, share, frame_distance)
    table_of = np.zeros((shape.steps, shape.layers, shape.heads), np.int32)
    table_of[list(dense_steps)] = DENSE
    return SparsityPlan("window", shape, _packed(table[None]), table_of)


def calibrated_plan(
    shape: PlanShape,
    mass: Callable[[int, int], NDArray[np.floating]],
    share: float,
    dense_steps: Collection[int] = (),
) -> SparsityPlan:
    """The fewest blocks that hold a share of the mass.

    mass: of a step and a layer, (H, Q, K), whose rows sum to 1.
    """
    _check(shape, share, dense_steps)
    table_of = np.full((shape.steps, shape.layers, shape.heads), DENSE, np.int32)
    found: dict[bytes, int] = {}
    for step in range(shape.steps):
        for layer in range(shape.layers if step not in dense_steps else 0):
            kept = fewest_blocks(mass(step, layer), share)
            if kept.shape != (shape.heads, shape.blocks, shape.blocks):
                raise ValueError(f"block masses of step {step}, layer {layer} have the shape {kept.shape}")
            for head, table in enumerate(_packed(kept)):
                if not kept[head].all():
                    table_of[step, layer, head] = found.setdefault(table.tobytes(), len(found))
    row = math.ceil(shape.blocks / 8)
    tables = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), shape.blocks, row)
    return SparsityPlan("calibrated", shape, tables, table_of)


def nearest_blocks(order: TokenOrder, block: int, share: float, frame_distance: float) -> Kept:
    """(Q, K): for each block the nearest ones by the distance of their middles, itself first.

    The blocks that hold tokens of the first latent frame are always among them. `share` of all blocks is
    kept, rounded up; where the first frame alone is more, the first frame and the block itself.
    """
    starts = np.arange(0, len(order.tokens), block)
    sizes = np.diff(np.append(starts, len(order.tokens)))
    middles = np.add.reduceat(order.positions.astype(np.float64), starts) / sizes[:, None]
    middles *= (frame_distance, 1.0, 1.0)
    distances = np.linalg.norm(middles[:, None] - middles[None], axis=-1)
    distances[:, np.minimum.reduceat(order.positions[:, 0], starts) == 0] = -1.0
    np.fill_diagonal(distances, -2.0)
    always = (distances < 0).sum(1)
    wanted = np.maximum(always, math.ceil(share * len(starts)))
    return _first(np.argsort(distances, axis=-1, kind="stable"), wanted)


def fewest_blocks(mass: NDArray[np.floating], share: float) -> Kept:
    """The fewest blocks (.., Q, K) of each row whose mass reaches `share`; of equal ones the earlier."""
    ranked = np.argsort(-mass, axis=-1, kind="stable")
    reached = np.cumsum(np.take_along_axis(mass, ranked, -1), axis=-1, dtype=np.float64)
    needed = 1 + (reached < share).sum(-1)
    return _first(ranked, np.minimum(needed, mass.shape[-1]))


def _first(ranked: NDArray[np.int64], wanted: NDArray[np.int64]) -> Kept:
    """Where each row's first `wanted` entries of `ranked` point."""
    kept = np.zeros(ranked.shape, bool)
    np.put_along_axis(kept, ranked, np.arange(ranked.shape[-1]) < wanted[..., None], -1)
    return kept


def _check(shape: PlanShape, share: float, dense_steps: Collection[int]) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"a share to keep lies in 0..1 and above 0, not at {share}")
    if not all(0 <= step < shape.steps for step in dense_steps):
        raise ValueError(f"dense steps {sorted(dense_steps)} are not all among {shape.steps} steps")


def _packed(kept: Kept) -> NDArray[np.uint8]:
    return np.packbits(kept, axis=-1)


def _unpacked(tables: NDArray[np.uint8], blocks: int) -> Kept:
    return np.unpackbits(tables, axis=-1, count=blocks).astype(bool)
