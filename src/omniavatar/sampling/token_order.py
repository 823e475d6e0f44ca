"""An order of a window's tokens in which neighbours in the order are neighbours in time and space.

Sparse attention keeps or leaves whole blocks of consecutive tokens. In row order a block of 128 is a strip
one token high that cuts through a face; here it is a box. The first latent frame, which holds one video frame
where the others hold four, is a slab by itself; the rest of the time axis is cut into slabs of about
`section[0]` frames and the rows into strips of about `section[1]` rows, all as equal as they can be. Tokens
run along the columns of one strip, a cross-section at a time, then back along the next one, so that a block
that reaches over the end of a strip stays in one place. Every token has one place: nothing is padded.

Shapes: T latent frames, h w token rows and columns, L = T*h*w tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]
SECTION = (2, 8)
"""Frames and rows of a cross-section: with blocks of 128 tokens, boxes of 2 x 8 x 8."""


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of the tokens of `grid` (T, h, w). tokens: the token at each place, (L,) int64."""

    grid: Grid
    tokens: NDArray[np.int64]

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """The place of each token: the inverse of `tokens`."""
        inverse = np.empty_like(self.tokens)
        inverse[self.tokens] = np.arange(len(self.tokens))
        return inverse

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Frame, row and column of the token at each place, (L, 3)."""
        return np.stack(np.unravel_index(self.tokens, self.grid), axis=1)


def row_order(grid: Grid) -> TokenOrder:
    """The order in which the model makes tokens: by frame, row, column."""
    return TokenOrder(grid, np.arange(grid[0] * grid[1] * grid[2]))


def tile_order(grid: Grid, section: tuple[int, int] = SECTION) -> TokenOrder:
    """Tokens along the columns of slabs of frames and strips of rows; see the top of this file."""
    frames, rows, columns = grid
    if min(*grid, *section) < 1:
        raise ValueError(f"grid {grid} and section {section} must be positive")
    strips = -(-rows // section[1])
    slab_of = np.concatenate([[0], 1 + _parts(frames - 1, section[0])])
    frame, row, column = np.unravel_index(np.arange(frames * rows * columns), grid)
    slab, strip = slab_of[frame], _parts(rows, section[1])[row]
    run = slab * strips + np.where(slab % 2, strips - 1 - strip, strip)
    along = np.where(run % 2, columns - 1 - column, column)
    return TokenOrder(grid, np.lexsort((row, frame, along, run)))


def section_of(block: int) -> tuple[int, int]:
    """Frames and rows of a cross-section for blocks of `block` tokens, about as wide as they are high.

    (2, 8) for 128 tokens, (2, 4) for 64 and 32, (2, 2) for 16 and 8, (1, 1) for fewer than 8.
    """
    if block < 8:
        return 1, 1
    return 2, 2 ** int(math.log2(block / 2) / 2)


def _parts(size: int, about: int) -> NDArray[np.int64]:
    """For each of `size` positions its part: the fewest of at most `about`, as equal as can be."""
    parts = -(-size // about)
    return np.arange(size) * parts // max(1, size)
