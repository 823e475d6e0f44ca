"""A long video as chunks of one length, each from the last frames of the one before, by whole numbers.

Every chunk shows `new` frames and hides the `given` ones before them, the first chunk too: no frame of the
video is the portrait itself. Output frame n belongs to samples 640n to 640n+639 of the sound. For each chunk
the speech encoder hears the `buffer` of sound that ends where the chunk ends, silence before the sound's
start included; a chunk reads the last `rows` of its features.
Sources: SoulX-FlashHead and LeapTalk (their inference code).
"""

from __future__ import annotations

from dataclasses import dataclass

from omniavatar.types import Window

RATE = 16000
"""Samples a second of the sound."""


@dataclass(frozen=True)
class ChunkRule:
    """Sizes of a chunk.

    - frames: of a chunk, 1 + 4n. given: leading frames that are known from the chunk before.
    - fps: frames a second. buffer_s: seconds of sound that the speech encoder hears for a chunk.
    - reach: features before and after a frame's own that the frame hears.
    """

    frames: int = 33
    given: int = 5
    fps: int = 25
    buffer_s: int = 8
    reach: int = 2

    @property
    def new(self) -> int:
        """Frames that a chunk shows."""
        return self.frames - self.given

    @property
    def frame_samples(self) -> int:
        """Samples of one frame."""
        return RATE // self.fps

    @property
    def buffer_samples(self) -> int:
        """Samples that the speech encoder hears for a chunk."""
        return self.buffer_s * RATE

    @property
    def buffer_frames(self) -> int:
        """Features of the buffer, one a frame."""
        return self.buffer_s * self.fps

    @property
    def rows(self) -> int:
        """Features of the buffer, the last ones, that a chunk's frames hear."""
        return self.frames + self.reach

    @property
    def latents(self) -> int:
        """Latent frames of a chunk."""
        return (self.frames + 3) // 4


def plan_chunks(frames: int, rule: ChunkRule) -> tuple[Window, ...]:
    """The chunks of a video of `frames` frames, as windows. The last one is made whole and cut."""
    return tuple(
        Window(
            index,
            start=index * rule.new - rule.given,
            length=rule.frames,
            given_frames=rule.given if index else 1,
            new_frames=min(rule.new, frames - index * rule.new),
            hidden_frames=rule.given,
        )
        for index in range(-(-frames // rule.new))
    )


def frame_windows(rows: int, first: int, end: int, reach: int = 2) -> list[list[int]]:
    """For each frame from `first` to before `end`, the features that it hears.

    These are its own and `reach` before and after it. Those outside 0..`rows`-1 become the nearest inside.
    """
    return [
        [min(max(frame + step, 0), rows - 1) for step in range(-reach, reach + 1)]
        for frame in range(first, end)
    ]


def chunk_windows(rule: ChunkRule) -> list[list[int]]:
    """`frame_windows` of a chunk's frames, counted among its last `rows` features."""
    skipped = rule.buffer_frames - rule.rows
    heard = frame_windows(
        rule.buffer_frames, rule.buffer_frames - rule.frames, rule.buffer_frames, rule.reach
    )
    return [[row - skipped for row in frame] for frame in heard]
