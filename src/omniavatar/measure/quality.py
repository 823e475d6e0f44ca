"""How similar two videos are, frame by frame: PSNR and SSIM.

Both are means over frames of 8-bit RGB. SSIM (Wang et al. 2004) is computed on luma with a flat 7x7 window,
sample covariance and K = 0.01, 0.03, which are scikit-image's defaults for a grey picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

WINDOW = 7
LUMA = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class Quality:
    """Similarity of two videos. psnr_db: None for equal videos, whose PSNR is infinite."""

    psnr_db: float | None
    ssim: float
    frames: int


def compare(frames: Iterable[np.ndarray], reference: Iterable[np.ndarray]) -> Quality:
    """PSNR over the whole video and mean SSIM, of pairs of frames (H, W, 3) uint8.

    Raises ValueError for videos without frames or of different lengths.
    """
    squared, similar, count = 0.0, 0.0, 0
    for a, b in zip(frames, reference, strict=True):
        difference = a.astype(np.float64) - b.astype(np.float64)
        squared += float(np.mean(difference**2))
        similar += ssim(a @ LUMA, b @ LUMA)
        count += 1
    if not count:
        raise ValueError("no frames to compare")
    error = squared / count
    return Quality(10 * math.log10(255**2 / error) if error else None, similar / count, count)


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    """PSNR in dB of uint8 frames of one shape; 138 for equal ones."""
    error = np.square(made.astype(np.float32) - true.astype(np.float32)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two grey pictures (H, W) with values from 0 to 255."""
    mean_a, mean_b = _window_mean(a), _window_mean(b)
    pixels = WINDOW**2
    to_sample = pixels / (pixels - 1)
    variance_a = to_sample * (_window_mean(a * a) - mean_a**2)
    variance_b = to_sample * (_window_mean(b * b) - mean_b**2)
    covariance = to_sample * (_window_mean(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(np.mean(top / bottom))


def _window_mean(x: np.ndarray) -> np.ndarray:
    """Means of all WINDOW x WINDOW patches of the picture, by cumulative sums."""
    sums = np.pad(x.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    n = WINDOW
    inside = sums[n:, n:] - sums[:-n, n:] - sums[n:, :-n] + sums[:-n, :-n]
    return inside / n**2
