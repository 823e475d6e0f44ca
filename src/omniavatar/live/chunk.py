"""The values that leave a live session."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class LiveChunk:
    """A few frames and the sound that belongs to them.

    - frames: (N, H, W, 3) uint8 RGB.
    - audio: (n,) int16, mono, at `rate` samples a second; as long as the frames.
    - time: of the first frame on the session's clock, in seconds. A gap means dropped frames.
    - speaking: whether the sound is loud enough for speech.
    - delay: seconds from the arrival of the newest of its sound to its hand-over; None without such sound.
    """

    frames: np.ndarray
    audio: np.ndarray
    time: float
    fps: Fraction
    rate: int
    speaking: bool
    delay: float | None = None

    @property
    def seconds(self) -> float:
        """How long the frames are shown."""
        return float(len(self.frames) / self.fps)


@dataclass(frozen=True)
class LiveStats:
    """Counts and measured times of a session.

    - blocks: made so far.
    - frames: made so far.
    - dropped: frames that a slow consumer did not take in time.
    - stalls: how often a block was made too late, so that the picture stood still.
    - waiting: seconds of pushed sound that no block has used.
    - block_s: median seconds to make a block; None before it is measured.
    - period_s: seconds that a block is shown.
    - delay_s: the newest `LiveChunk.delay`.
    """

    blocks: int
    frames: int
    dropped: int
    stalls: int
    waiting: float
    block_s: float | None
    period_s: float
    delay_s: float | None

    @property
    def slow(self) -> bool:
        """Whether blocks take longer to make than to show."""
        return self.block_s is not None and self.block_s > self.period_s
