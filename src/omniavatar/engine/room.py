"""Whether the disk has room for a video, known before its first window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omniavatar.errors import OutputError
from omniavatar.types import bytes_text

if TYPE_CHECKING:
    from omniavatar.plan.run import RunPlan

LEAST_BITS = 0.04
"""Of a pixel at crf 18; half as many for each 6 more. A talking face needs two to six times this."""
COPIES = 2
"""While a video grows, its segments lie beside it."""
SOUND_BYTES = 24_000
"""Of a second of stereo."""
KEPT_BITS = 0.5
"""Of a pixel kept without loss; a talking face needs two to four times this."""


def least_bytes(plan: RunPlan, crf: int, done: int = 0, kept_frames: int = 0) -> int:
    """Bytes that the windows from number `done` on take at the very least while the video is made.

    kept_frames: how many frames lie beside them without loss.
    """
    height, width = plan.size
    frames = sum(window.new_frames for window in plan.windows[done:])
    picture = frames * height * width * LEAST_BITS / 8 / 2 ** ((crf - 18) / 6)
    kept = min(kept_frames, frames) * height * width * KEPT_BITS / 8
    return round(COPIES * picture + kept + SOUND_BYTES * frames / plan.fps)


def check_room(output: Path, needed: int, free: int) -> None:
    """Raise OutputError if `free` bytes cannot hold the video."""
    if free < needed:
        raise OutputError(
            f"cannot write {output}: the plan needs at least {bytes_text(needed)}, its disk has "
            f"{bytes_text(free)} free; free some space or choose another folder"
        )
