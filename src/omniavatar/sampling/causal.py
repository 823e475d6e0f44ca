"""Which past latents a block of a block-causal model sees.

A block-causal model makes a video block after block. A block attends to itself and to the keys and values
that earlier blocks left in a cache: the first blocks of the video (the sink), which stay for ever, and the
newest ones. The cache has a fixed number of slots of one block each, so memory and time of a block are
constant.
Attention does not depend on the order of keys, so the newest block takes the slot of the oldest that may go.
Sources: CausVid (arXiv 2412.07772), Self Forcing (arXiv 2506.08009), attention sinks (arXiv 2309.17453).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniavatar.errors import ConfigError
from omniavatar.sampling.windows import KEPT


@dataclass(frozen=True)
class CausalWindow:
    """Sizes of the attention window, in latent frames.

    - block: latents that are made together.
    - window: latents that a block attends to, the sink and the block itself included.
    - sink: latents from the video's start that are never dropped.

    Raises ConfigError if the sink or the window is not made of whole blocks, or if no place is left.
    """

    block: int
    window: int
    sink: int

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ConfigError(f"causal_block={self.block}: a block has at least 1 latent frame")
        for name, value in (("causal_window", self.window), ("causal_sink", self.sink)):
            if value % self.block or value < 0:
                nearest = max(0, round(value / self.block)) * self.block
                raise ConfigError(
                    f"{name}={value}: must be a multiple of causal_block={self.block}; use {nearest}"
                )
        if self.window < self.sink + self.block:
            raise ConfigError(
                f"causal_window={self.window}: must hold the sink ({self.sink} latent frames) and one block; "
                f"raise it to at least {self.sink + self.block}"
            )

    @property
    def slots(self) -> int:
        """Blocks that the cache holds, the current one included."""
        return self.window // self.block

    @property
    def rolling(self) -> int:
        """Earlier blocks that a block sees beside the sink, once the cache is full."""
        return (self.window - self.sink) // self.block - 1

    def blocks_of(self, latents: int) -> int:
        """Blocks that cover `latents` latents."""
        return -(-latents // self.block)

    def slot(self, block: int) -> int:
        """The slot that block number `block` is written to."""
        if block < self.slots:
            return block
        sink = self.sink // self.block
        return sink + (block - sink) % (self.slots - sink)

    def filled(self, block: int) -> int:
        """Slots, from the first one, that hold a block when block number `block` is written."""
        return min(block + 1, self.slots)

    def seen(self, block: int) -> tuple[int, ...]:
        """Numbers of the blocks that block number `block` attends to, ascending."""
        sink = self.sink // self.block
        newest = range(max(sink, block - self.rolling), block + 1)
        return (*range(min(sink, block + 1)), *newest)

    def deciding(self, block: int, layers: int) -> tuple[int, ...]:
        """Numbers of the earlier blocks that decide what the cache holds for block number `block`, ascending.

        Keys of the first layer depend on their own block only; those of each later layer also on what their
        block saw one layer earlier. So with `layers` layers, the newest blocks reach back `layers` times as
        far as one block sees. Older blocks do not matter, except for the sink.
        """
        sink = min(self.sink // self.block, block)
        return (*range(sink), *range(max(sink, block - self.rolling * layers), block))


@dataclass(frozen=True)
class BlockHandOvers:
    """A `HandOvers`: a block starts from the earlier blocks that decide its cache and its decoder's state.

    - layers: of the DiT.
    - decoded: earlier blocks on which the pixels of a block depend.
    """

    window: CausalWindow
    layers: int
    decoded: int

    def needed(self, window: int) -> Sequence[int]:
        shown = range(max(0, window - self.decoded), window)
        return sorted({block + 1 for block in (*self.window.deciding(window, self.layers), *shown)})

    def outdated(self, done: int) -> int | None:
        reach = max(self.window.rolling * self.layers, self.decoded)
        old = done - reach - KEPT
        return old if old > self.window.sink // self.window.block else None
