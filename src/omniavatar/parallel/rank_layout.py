"""Assigns guidance branches, heads and tokens to the ranks that make one video; arithmetic only.

rank = guidance group * sp_size + sequence rank. In a sequence group, attention is divided by heads over
`ulysses` ranks (the largest number that divides both) and by query tokens over `rows` ranks: sequence rank =
row * ulysses + head part. Tokens form consecutive runs whose lengths differ by at most one, so no padding or
mask is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Layout:
    """`guidance` groups of `sequence` ranks each, for a model of `heads` attention heads."""

    guidance: int
    sequence: int
    heads: int

    @property
    def size(self) -> int:
        return self.guidance * self.sequence

    @property
    def ulysses(self) -> int:
        """Number of ranks that share the heads."""
        return math.gcd(self.heads, self.sequence)

    @property
    def rows(self) -> int:
        """Number of groups of `ulysses` ranks; the groups share the query tokens."""
        return self.sequence // self.ulysses

    def guidance_of(self, rank: int) -> int:
        return rank // self.sequence

    def sequence_of(self, rank: int) -> int:
        return rank % self.sequence

    def guidance_peers(self) -> list[list[int]]:
        """Groups of ranks with the same tokens of different branches."""
        return [list(range(first, self.size, self.sequence)) for first in range(self.sequence)]

    def sequence_peers(self) -> list[list[int]]:
        """Groups of ranks that share one forward."""
        return [list(range(first, first + self.sequence)) for first in range(0, self.size, self.sequence)]

    def head_peers(self) -> list[list[int]]:
        """Groups of ranks that exchange heads for tokens."""
        return [list(range(first, first + self.ulysses)) for first in range(0, self.size, self.ulysses)]

    def row_peers(self) -> list[list[int]]:
        """Groups of ranks with the same heads of different tokens."""
        return [
            peers[part :: self.ulysses] for peers in self.sequence_peers() for part in range(self.ulysses)
        ]


def deal(total: int, parts: int) -> list[int]:
    """Lengths of `parts` consecutive runs that sum up to `total` and differ by at most one, longer first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def starts(sizes: list[int]) -> list[int]:
    """Start of each of these consecutive runs."""
    return [0, *accumulate(sizes)][:-1]
