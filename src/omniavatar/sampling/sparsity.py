"""Which blocks of the attention matrix are computed: plans by name, pure numbers.

A plan says for each step, layer and head which blocks of keys each block of queries attends to. Blocks are
runs of `block` consecutive tokens of a `TokenOrder`; the last one may be shorter.
- dense: all of them.
- window: the nearest in time and space, and the blocks of the first latent frame, which shows the portrait.
  It needs no measurement, and is the same for every layer and head.
- calibrated: for each block of queries the fewest blocks whose share of the softmax, as measured with every
  block computed, reaches a stated one.
  A measurement is kept as levels (`MassLevels`), from which a plan of any share is made without another one.
Steps may stay dense: with no dense early step a video is no longer the one that dense attention makes.
Sources: SpargeAttention (arXiv 2502.18137), Sliding Tile Attention (arXiv 2502.04507), Sparse VideoGen
(arXiv 2502.01776).

Shapes: Q K blocks of queries and of keys (equal), H heads, U different tables, L tokens, G groups of steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omniavatar.sampling.token_order import Grid, TokenOrder, section_of, tile_order

Name = Literal["dense", "window", "calibrated"]
Kept = NDArray[np.bool_]
DENSE = -1
FRAME_DISTANCE = 2.0
"""How many rows or columns apart two tokens count as that are one latent frame apart."""


LEVELS = 256
LEAST_LOST = 1e-6
LEVEL_STEP = -math.log(LEAST_LOST) / (LEVELS - 1)
"""Levels count the mass that is lost, in equal ratios from 1 to `LEAST_LOST`."""


@dataclass(frozen=True)
class PlanShape:
    """What a plan is for. grid: latent frames, token rows and columns. block: tokens of a block."""

    steps: int
    layers: int
    heads: int
    grid: Grid
    block: int

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def order(self) -> TokenOrder:
        """The order of the tokens in which blocks are counted."""
        return tile_order(self.grid, section_of(self.block))

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
    mass: share of the softmax that every row keeps at least, if it was measured.
    """

    name: Name
    shape: PlanShape
    tables: NDArray[np.uint8]
    table_of: NDArray[np.int32]
    mass: float | None = None

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
        sizes, whole = self.shape.block_tokens, self.shape.tokens**2
        shares = [sizes @ _unpacked(table, self.shape.blocks) @ sizes / whole for table in self.tables]
        return np.array([*shares, 1.0])[self.table_of]

    def longest_rows(self) -> NDArray[np.int64]:
        """For each table the most blocks that a row keeps, (U,)."""
        return np.array([_unpacked(table, self.shape.blocks).sum(-1).max() for table in self.tables])

    @cached_property
    def step_shares(self) -> tuple[float, ...]:
        """The share of the attention matrix that each step computes; 1 for a dense step."""
        return tuple(float(share) for share in self.shares().mean((1, 2)))

    @property
    def sparse_steps(self) -> tuple[int, ...]:
        """The steps that are not wholly dense."""
        return tuple(int(step) for step in np.flatnonzero((self.table_of != DENSE).any((1, 2))))

    @property
    def kept_share(self) -> float:
        """Mean share of the sparse steps; 1 without one."""
        return float(np.mean([self.step_shares[step] for step in self.sparse_steps] or [1.0]))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides which blocks are computed."""
        found = hashlib.sha256(repr(self.shape).encode())
        for array in (self.tables, self.table_of):
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def dense_above(self, limit: float) -> SparsityPlan:
        """This plan with dense layers where a layer would compute more than `limit` of its matrix."""
        if limit >= 1:
            return self
        table_of = np.where(self.shares().mean(2, keepdims=True) > limit, DENSE, self.table_of)
        return replace(self, table_of=table_of.astype(np.int32))

    def of_step(self, step: int) -> SparsityPlan:
        """The plan of a single step."""
        return replace(self, shape=replace(self.shape, steps=1), table_of=self.table_of[step : step + 1])

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON, without its tables."""
        return {
            "attention": self.name,
            "block_size": self.shape.block,
            "kept_share": self.kept_share,
            "step_shares": list(self.step_shares),
            "mass": self.mass,
            "digest": self.digest,
        }


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
    tables = _Tables(shape)
    for step in range(shape.steps):
        for layer in range(shape.layers if step not in dense_steps else 0):
            kept = fewest_blocks(mass(step, layer), share)
            if kept.shape != (shape.heads, shape.blocks, shape.blocks):
                raise ValueError(f"block masses of step {step}, layer {layer} have the shape {kept.shape}")
            table_of[step, layer] = tables.numbers(kept)
    return SparsityPlan("calibrated", shape, tables.packed(), table_of, share)


class _Tables:
    """Different tables, numbered as they come."""

    def __init__(self, shape: PlanShape) -> None:
        self._shape = shape
        self._found: dict[bytes, int] = {}

    def numbers(self, kept: Kept) -> list[int]:
        """The number of each head's table (H, Q, K), DENSE for one that keeps everything."""
        return [
            DENSE if each.all() else self._found.setdefault(table.tobytes(), len(self._found))
            for each, table in zip(kept, _packed(kept), strict=True)
        ]

    def packed(self) -> NDArray[np.uint8]:
        row = math.ceil(self._shape.blocks / 8)
        joined = np.frombuffer(b"".join(self._found), np.uint8)
        return joined.reshape(len(self._found), self._shape.blocks, row)


@dataclass(frozen=True, eq=False)
class MassLevels:
    """Measured block masses, as the share of its row's mass that lies in larger blocks.

    levels: (G, layers, H, Q, K) uint8 by `mass_levels`: a plan that keeps the blocks below a number `cut`
    keeps at least `mass_of(cut)` of each row, and nearly the fewest blocks that do.
    """

    shape: PlanShape
    levels: NDArray[np.uint8]

    def plan(self, steps: int, dense_steps: int, cut: int) -> SparsityPlan:
        """The plan for `steps`, of which the first `dense_steps` are dense; the others share the groups."""
        shape = replace(self.shape, steps=steps)
        groups, sparse = len(self.levels), steps - dense_steps
        table_of = np.full((steps, shape.layers, shape.heads), DENSE, np.int32)
        tables = _Tables(shape)
        group_of = np.arange(sparse) * groups // max(1, sparse)
        for group, layer in np.ndindex(groups, shape.layers):
            table_of[dense_steps:, layer][group_of == group] = tables.numbers(self.levels[group, layer] < cut)
        return SparsityPlan("calibrated", shape, tables.packed(), table_of, mass_of(cut))

    def cut_of_density(self, density: float) -> int:
        """The largest number whose plan computes at most `density` of the matrix; 1 if none does."""
        sizes = self.shape.block_tokens / self.shape.tokens
        weights = np.broadcast_to(np.outer(sizes, sizes), self.levels.shape[2:]).ravel()
        held = np.zeros(LEVELS)
        for group, layer in np.ndindex(self.levels.shape[:2]):
            held += np.bincount(self.levels[group, layer].ravel(), weights, LEVELS)
        held /= math.prod(self.levels.shape[:3])
        return max(1, int(np.searchsorted(np.cumsum(held), density + 1e-9, side="right")))


def mass_levels(mass: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The level of each block (.., Q, K): 0 for the largest of a row; of equal ones the earlier is larger."""
    ranked = np.argsort(-mass, axis=-1, kind="stable")
    fallen = np.take_along_axis(mass, ranked, -1).astype(np.float64)
    before = np.cumsum(fallen, axis=-1) - fallen
    lost = np.clip(1 - before / fallen.sum(-1, keepdims=True), LEAST_LOST, 1)
    levels = np.empty(mass.shape, np.uint8)
    np.put_along_axis(levels, ranked, np.floor(-np.log(lost) / LEVEL_STEP).astype(np.uint8), -1)
    return levels


def cut_of_mass(share: float) -> int:
    """The number below which the levels of a plan lie that keeps `share` of the mass."""
    if share >= 1 - LEAST_LOST:
        return LEVELS
    return max(1, math.ceil(-math.log1p(-share) / LEVEL_STEP))


def mass_of(cut: int) -> float:
    """The share of the mass that the blocks below `cut` hold at least."""
    return 1.0 if cut >= LEVELS else -math.expm1(-cut * LEVEL_STEP)


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
