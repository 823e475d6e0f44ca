"""Projects the time of a whole video from the measured parts of one window, by counting.

Windows run one after the other on the model's thread: forwards, decode, encode of the hand-over. The video
writer works beside it, on several windows at once. The model waits for it only where it is the slower of the
two; its work for the last window is added. Loading the models and embedding a new prompt do not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one part, in seconds."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        return cls(statistics.median(times), min(times), max(times), len(times))


@dataclass(frozen=True)
class WindowCosts:
    """Seconds of one window's parts.

    forward, skipped_forward: one each. decode: of the whole window. encode: of the hand-over.
    write: of the new frames. sparse_forward: one with sparse attention. writers: windows written at once.
    """

    forward: float
    skipped_forward: float
    decode: float
    encode: float
    write: float
    sparse_forward: float = 0.0
    writers: int = 1


@dataclass(frozen=True)
class StartCosts:
    """Seconds before the first window: portrait to latent, and features of one second of audio."""

    portrait: float
    audio_per_second: float


@dataclass(frozen=True)
class Counts:
    """Counts of a plan.

    computed, skipped: forwards of a window. sparse: the computed ones with sparse attention.
    last_share: part of the last window's latents that is decoded.
    """

    windows: int
    computed: int
    skipped: int
    last_share: float
    audio_seconds: float
    sparse: int = 0


def denoise_seconds(costs: WindowCosts, counts: Counts) -> float:
    """Seconds of all forwards of one window."""
    dense = (counts.computed - counts.sparse) * costs.forward
    return dense + counts.sparse * costs.sparse_forward + counts.skipped * costs.skipped_forward


def held_by_writer(costs: WindowCosts, counts: Counts) -> bool:
    """Whether the model waits for the video encoder."""
    return costs.write / costs.writers > denoise_seconds(costs, counts) + costs.decode + costs.encode


def video_seconds(costs: WindowCosts, start: StartCosts, counts: Counts) -> float:
    """Seconds from audio to finished video, models loaded."""
    denoise = denoise_seconds(costs, counts)
    whole = denoise + costs.decode + costs.encode
    last = denoise + costs.decode * counts.last_share
    begin = start.portrait + start.audio_per_second * counts.audio_seconds
    if counts.windows == 1:
        return begin + last + costs.write
    behind = costs.write / costs.writers
    between = (counts.windows - 2) * max(whole, behind)
    return begin + whole + between + max(last, behind) + costs.write
