"""Figures from landmarks and frames, in plain numpy.

Shapes: T frames, H W pixels; landmarks (T, 478, 3) as `read_faces.py` writes them, nan where no face was
found. Openings are (T,), divided by the distance of the eyes.
"""

from __future__ import annotations

from collections.abc import Sized

import numpy as np
from PIL import Image
from training.measure_mouth import EYES, INNER_LIPS
from training.phones import FPS

MAX_LAG = 5
FIRST_FRAME = 1
PAUSE_FRAMES, PAUSE_BORDER = 7, 2
FACE, EYE_ROW, EYE_GAP = 64, 26, 20
NOSE = (168, 6, 197, 195, 5, 4, 1, 19, 94, 2, 98, 327, 64, 294, 129, 358, 48, 278)
CHEEKBONES = (33, 133, 362, 263, 116, 345, 117, 346, 50, 280, 101, 330)
FOREHEAD = (10, 338, 297, 332, 284, 251, 389, 109, 67, 103, 54, 21, 162)
SIDES = (127, 356, 234, 454, 93, 323, 132, 361)
FIRM = np.array([*NOSE, *CHEEKBONES, *FOREHEAD, *SIDES])
"""Points that neither speech nor blinks nor brows move."""


def opening(landmarks: np.ndarray) -> np.ndarray:
    """Gap of the inner lips over the distance of the eyes, (T,), in the picture's plane."""
    places = landmarks[..., :2]
    eyes = [places[:, list(corners)].mean(1) for corners in EYES]
    gap = np.linalg.norm(places[:, INNER_LIPS[0]] - places[:, INNER_LIPS[1]], axis=-1)
    return gap / np.linalg.norm(eyes[0] - eyes[1], axis=-1)


def correlation(read: np.ndarray, expected: np.ndarray, lag: int = 0) -> float:
    """Correlation of the read openings with the expected ones `lag` frames before.

    0 if fewer than ten frames show a face or if either is constant. Frame 0, the portrait, is left out.
    """
    count = min(len(read), len(expected))
    read, expected = read[FIRST_FRAME:count], expected[FIRST_FRAME:count]
    read = read[max(lag, 0) : len(read) + min(lag, 0)]
    expected = expected[max(-lag, 0) : len(expected) + min(-lag, 0)]
    seen = ~np.isnan(read)
    if seen.sum() < 10 or np.ptp(read[seen]) == 0 or np.ptp(expected[seen]) == 0:
        return 0.0
    return float(np.corrcoef(read[seen], expected[seen])[0, 1])


def best_lag(read: np.ndarray, expected: np.ndarray) -> int:
    """The lag in frames with the highest correlation; MAX_LAG + 1 if all correlations are 0."""
    values = {lag: correlation(read, expected, lag) for lag in range(-MAX_LAG, MAX_LAG + 1)}
    return max(values, key=lambda lag: values[lag]) if any(values.values()) else MAX_LAG + 1


def pauses(speaking: np.ndarray) -> np.ndarray:
    """(T,) bool: the inside of pauses of at least `PAUSE_FRAMES`.

    Frames in which the mouth still closes or already opens do not count.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[1], speaking.astype(np.int8), [1]])))
    inside = np.zeros(len(speaking), bool)
    for begin, end in edges.reshape(-1, 2):
        if end - begin >= PAUSE_FRAMES:
            inside[begin + PAUSE_BORDER : end - PAUSE_BORDER] = True
    return inside


def rest_ratio(read: list[np.ndarray], speaking: list[np.ndarray]) -> float:
    """Mean opening in the pauses of all clips over that in their speech; nan if either shows no face."""
    quiet, loud = [], []
    for each, spoken in zip(read, speaking, strict=True):
        count = min(len(each), len(spoken))
        quiet.append(each[:count][pauses(spoken)[:count]])
        loud.append(each[:count][spoken[:count]])
    values = [np.concatenate(part) for part in (quiet, loud)]
    means = [float(part[~np.isnan(part)].mean()) if (~np.isnan(part)).any() else np.nan for part in values]
    return means[0] / means[1]


def sharpness(frames: np.ndarray) -> float:
    """Variance of the Laplacian of the luma, mean over uint8 frames (T, H, W, 3)."""
    luma = frames @ np.array([0.299, 0.587, 0.114], np.float32)
    laplacian = (luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]) - 4 * luma[
        :, 1:-1, 1:-1
    ]
    return float(laplacian.var(axis=(1, 2)).mean())


def aligned_face(frame: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The face, turned and scaled so that the eyes have fixed places: float32 (FACE, FACE, 3).

    frame: uint8. landmarks: (478, 3). Hair and neck are included.
    """
    left, right = (landmarks[list(corners), :2].mean(0) for corners in EYES)
    across = (right - left) / EYE_GAP
    down = np.array([-across[1], across[0]])
    centre = (left + right) / 2
    corner = centre - across * FACE / 2 - down * EYE_ROW
    matrix = (across[0], down[0], corner[0], across[1], down[1], corner[1])
    picture = Image.fromarray(frame).transform((FACE, FACE), Image.AFFINE, matrix, Image.BICUBIC)
    return np.asarray(picture, np.float32)


def face_shape(landmarks: np.ndarray) -> np.ndarray:
    """(points, 3): the firm points of one face, centred and of unit size."""
    points = landmarks[FIRM] - landmarks[FIRM].mean(0)
    return points / np.linalg.norm(points)


def shape_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Distance of two `face_shape`s after the best rotation (Procrustes)."""
    u, values, v = np.linalg.svd(one.T @ other)
    if np.linalg.det(u @ v) < 0:
        values[-1] *= -1
    return float(np.sqrt(max(0.0, 2 - 2 * values.sum())))


def colour_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two pictures, 0 to 255."""
    return float(np.sqrt(np.square(one - other).mean()))


def mean_shape(landmarks: np.ndarray) -> np.ndarray:
    """Mean `face_shape` of (T, 478, 3), each turned onto the first that shows a face; nan without a face."""
    shapes = [face_shape(points) for points in landmarks if not np.isnan(points).any()]
    if not shapes:
        return np.full((len(FIRM), 3), np.nan)
    turned = []
    for shape in shapes:
        u, _, v = np.linalg.svd(shape.T @ shapes[0])
        flip = np.diag([1, 1, np.sign(np.linalg.det(u @ v))])
        turned.append(shape @ (u @ flip @ v))
    mean = np.mean(turned, 0)
    return mean / np.linalg.norm(mean)


def mean_face(frames: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Mean `aligned_face` of the frames that show a face; nan without any."""
    faces = [
        aligned_face(frame, points)
        for frame, points in zip(frames, landmarks, strict=True)
        if not np.isnan(points).any()
    ]
    return np.mean(faces, 0) if faces else np.full((FACE, FACE, 3), np.nan)


def seconds_of(frames: Sized, second: float) -> slice:
    """The frames of the one second around a moment, kept inside the video."""
    middle = round(second * FPS)
    stop = min(len(frames), middle + FPS // 2 + 1)
    return slice(max(0, min(middle - FPS // 2, stop - FPS)), stop)


def moments(frames: Sized) -> list[float]:
    """Every full second of a video, and half a second before its end."""
    last = len(frames) / FPS - 0.5
    return [float(second) for second in range(1, int(last))] + [last]
