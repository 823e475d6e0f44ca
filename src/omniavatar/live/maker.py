"""What a live session needs from a model: something that makes block after block of frames from sound.

`live.causal` makes the blocks of a block-causal model, `live.chunked` the chunks of FlashHead and LeapTalk,
and `live.windowed` takes an overlapping window as a block. Tests bring small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MODEL_RATE = 16000
"""Samples a second of the sound that a maker takes."""


class BlockMaker(Protocol):
    """Makes the blocks of one session in order. It is used by one thread at a time."""

    @property
    def fps(self) -> Fraction:
        """Frames a second."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the frames."""
        ...

    @property
    def frames(self) -> int:
        """Frames of the next block."""
        ...

    @property
    def missing(self) -> int:
        """Samples that must be pushed before the next block can be made, its look-ahead included."""
        ...

    def push(self, samples: np.ndarray) -> None:
        """Append sound: (n,) float32 at `MODEL_RATE`."""
        ...

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        """Pieces (n, H, W, 3) uint8 of the next block, `frames` in total.

        - stop: checked between two steps of the model; True ends the block.

        Raises StoppedError if it was stopped: the block is then left out, and the next one takes its place.
        """
        ...

    def set_prompt(self, prompt: str) -> None:
        """Use another prompt from the next block on. Raises InputError."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that later blocks depend on, as tensors on the host."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` of a maker of the same portrait and settings. Raises ResumeError."""
        ...

    def close(self) -> None:
        """Free what belongs to this session alone."""
        ...
