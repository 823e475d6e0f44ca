"""Which rank does what when several processes make one video; arithmetic only.

Ranks count guidance groups outside, sequence ranks inside: rank = guidance * sp_size + sequence. Within a
sequence group attention is spread over `ulysses` ranks by heads, as many as divide them, and over `rows`
ranks by query tokens: sequence = row * ulysses + head part. Tokens are dealt out in consecutive runs that
differ by one token at most, so there is no padding and nothing to mask.
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
        """Ranks that share the heads."""
        return math.gcd(self.heads, self.sequence)

    @property
    def rows(self) -> int:
        """Groups of `ulysses` ranks that share the query tokens."""
        return self.sequence // self.ulysses

    def guidance_of(self, rank: int) -> int:
        return rank // self.sequence

    def sequence_of(self, rank: int) -> int:
        return rank % self.sequence

    def guidance_peers(self) -> list[list[int]]:
        """Ranks that hold the same tokens of different branches."""
        return [list(range(place, self.size, self.sequence)) for place in range(self.sequence)]

    def sequence_peers(self) -> list[list[int]]:
        """Ranks that share one forward."""
        return [list(range(first, first + self.sequence)) for first in range(0, self.size, self.sequence)]

    def head_peers(self) -> list[list[int]]:
        """Ranks that exchange heads for tokens."""
        return [list(range(first, first + self.ulysses)) for first in range(0, self.size, self.ulysses)]

    def row_peers(self) -> list[list[int]]:
        """Ranks that hold the same heads of different tokens."""
        return [
            peers[part :: self.ulysses] for peers in self.sequence_peers() for part in range(self.ulysses)
        ]


def deal(total: int, parts: int) -> list[int]:
    """`total` in consecutive runs that differ by one at most, the longer ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def starts(sizes: list[int]) -> list[int]:
    """Where each of consecutive runs begins."""
    return [0, *accumulate(sizes)][:-1]
