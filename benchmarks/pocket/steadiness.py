"""Figures of what should not change from frame to frame: seams of windows, backgrounds, whole lips.

Shapes: T frames uint8 (T, H, W, 3), H W pixels; landmarks (T, 478, 3), nan where no face was found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from training.scale import OVERLAP, WINDOW

from omniavatar.config.schema import PipelineConfig
from omniavatar.sampling.windows import block_frames

STATIC = 2
"""Grey levels by which a background pixel of the film may move."""
MARGIN = 8
"""Pixels between what moves in the film and what counts as background."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
OUTER_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
EXCESS = 1.3
"""Factor of the film's 99th percentile above which a frame counts as torn."""


def first_new_frames(frames: int) -> list[int]:
    """The first new frame of each window after the first, of the packaged model."""
    return list(range(WINDOW, frames, WINDOW - OVERLAP))


def first_of_blocks(frames: int, latents: int) -> list[int]:
    """The first frame of each block of `latents` latents after the first."""
    return list(range(block_frames(0, latents), frames, block_frames(1, latents)))


def seam_frames(config: PipelineConfig, frames: int) -> list[int]:
    """The frames at which a video that `config` makes may jump."""
    causal = config.sampling.causal
    return first_of_blocks(frames, causal.block) if causal else first_new_frames(frames)


def seam_ratio(frames: np.ndarray, firsts: Sequence[int]) -> float:
    """Median over windows or blocks of the frame difference at their first new frame, over the median of all;
    nan for one window or a picture that stands still.

    firsts: those frames.
    """
    steps = np.array(
        [
            np.abs(one.astype(np.float32) - other).mean()
            for one, other in zip(frames[1:], frames, strict=False)
        ]
    )
    seams = [frame - 1 for frame in firsts]
    usual = float(np.median(steps))
    return float(np.median(steps[seams]) / usual) if seams and usual > 0 else float("nan")


def background(film: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels that do not move in the film, away from those that do."""
    moving = (film.max(0).astype(int) - film.min(0)).max(-1) > STATIC
    padded = np.pad(moving, MARGIN)
    height, width = moving.shape
    near = np.zeros_like(moving)
    for down in range(2 * MARGIN + 1):
        near |= padded[down : down + height, MARGIN : MARGIN + width]
    padded = np.pad(near, MARGIN)
    for across in range(2 * MARGIN + 1):
        near |= padded[MARGIN : MARGIN + height, across : across + width]
    return ~near


def flicker(frames: np.ndarray, still: np.ndarray) -> float:
    """Mean standard deviation over time of the luma of the pixels in `still` (H, W), in grey levels."""
    if not still.any():
        return float("nan")
    return float((frames[:, still] @ LUMA).std(0).mean())


def mouth_edges(frames: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(T,) strongest change of colour, at equal lightness, between neighbours around the lips (99th
    percentile, grey levels): tears have coloured edges. nan without a face."""
    values = np.full(len(frames), np.nan)
    for number, (frame, points) in enumerate(zip(frames, landmarks, strict=True)):
        lips = points[list(OUTER_LIPS), :2]
        if np.isnan(lips).any():
            continue
        (left, top), (right, bottom) = lips.min(0).astype(int) - 2, lips.max(0).astype(int) + 3
        box = frame[max(0, top) : bottom, max(0, left) : right].astype(np.float32)
        colour = box - (box @ LUMA)[..., None]
        down, across = np.abs(np.diff(colour, axis=0)).sum(-1), np.abs(np.diff(colour, axis=1)).sum(-1)
        values[number] = np.percentile(np.concatenate([down.ravel(), across.ravel()]), 99)
    return values


def lip_jerks(landmarks: np.ndarray) -> np.ndarray:
    """(T,) largest second difference of a point of the lips over the distance of the eyes; 0 at both ends,
    nan without a face."""
    places = landmarks[..., :2]
    eyes = np.linalg.norm(places[:, [33, 133]].mean(1) - places[:, [362, 263]].mean(1), axis=-1)
    lips = places[:, list(OUTER_LIPS)] - places[:, [1]]
    jerk = np.zeros(len(places))
    second = lips[2:] - 2 * lips[1:-1] + lips[:-2]
    jerk[1:-1] = np.linalg.norm(second, axis=-1).max(1) / eyes[1:-1]
    return jerk


def torn_share(made: np.ndarray, true: np.ndarray) -> float:
    """Share of frames whose value (T,) is above EXCESS times the 99th percentile of the film's."""
    limit = EXCESS * float(np.nanpercentile(true, 99))
    return float((made[~np.isnan(made)] > limit).mean()) if (~np.isnan(made)).any() else float("nan")
