"""From the measured times of one window's parts to the time of a whole video, by counting.

Windows run one after the other on the model's thread: forwards, decode, encode of the hand-over. The video
writer works beside it, one window behind, and is waited for only where it is the slower of the two; what it
does for the last window comes on top. Left out: loading the models, and embedding a new prompt.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in seconds."""

    median: float
    fastest: float
    slowest: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        return cls(statistics.median(times), min(times), max(times), len(times))


@dataclass(frozen=True)
class WindowCosts:
    """Seconds of one window's parts: a computed forward, a skipped one, the decode of the whole window, the
    encode of the hand-over, writing its new frames."""

    forward: float
    skipped_forward: float
    decode: float
    encode: float
    write: float


@dataclass(frozen=True)
class StartCosts:
    """Seconds before the first window: portrait to latent, and audio features for a second of sound."""

    portrait: float
    audio_per_second: float


@dataclass(frozen=True)
class Counts:
    """What a plan counts. computed, skipped: forwards of a window. last_share: part of the last window's
    latents that is decoded."""

    windows: int
    computed: int
    skipped: int
    last_share: float
    audio_seconds: float


def denoise_seconds(costs: WindowCosts, counts: Counts) -> float:
    """All forwards of one window."""
    return counts.computed * costs.forward + counts.skipped * costs.skipped_forward


def video_seconds(costs: WindowCosts, start: StartCosts, counts: Counts) -> float:
    """Audio to finished video, models loaded."""
    denoise = denoise_seconds(costs, counts)
    whole = denoise + costs.decode + costs.encode
    last = denoise + costs.decode * counts.last_share
    begin = start.portrait + start.audio_per_second * counts.audio_seconds
    if counts.windows == 1:
        return begin + last + costs.write
    between = (counts.windows - 2) * max(whole, costs.write)
    return begin + whole + between + max(last, costs.write) + costs.write
