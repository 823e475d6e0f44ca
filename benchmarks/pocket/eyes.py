"""Figures of the eyes: blinks, both lids together, gaze of both, colour of the iris.

Shapes: T frames, H W pixels; landmarks (T, 478, 3) as `read_faces.py` writes them, nan where no face was
found. What has two columns has one for each eye, the right one first. Lids are measured against the same
person's first frame, the portrait, where they are open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from training.phones import FPS

CORNERS = ((33, 133), (362, 263))
LIDS = (((159, 145), (158, 153), (160, 144)), ((386, 374), (385, 380), (387, 373)))
IRISES = ((468, 469, 470, 471, 472), (473, 474, 475, 476, 477))
SHUT, OPEN, WHOLLY = 0.62, 0.88, 0.5
"""Lid gaps over the portrait's: below the first a blink begins, above the second it has ended, and below the
third it was complete. In 14 films of the renderer with 19 known blinks these find 19, of which 18 are
complete, and 0.1 % of frames with one eye shut: the mesh follows lids late, and smiles narrow eyes."""
LONGEST_BLINK = FPS
RING = (0.5, 0.95)
"""Radii of the ring that is read, over that of the iris."""
WIDE_OPEN = 0.7
"""Least lid gap over the portrait's in frames whose irises are read."""


@dataclass(frozen=True)
class Blinks:
    """Blinks of one clip; `complete` of them shut the eyes wholly. frames: those that show a face."""

    count: int
    complete: int
    frames: int

    @property
    def a_minute(self) -> float:
        return self.count * 60 * FPS / max(1, self.frames)


def lid_gaps(landmarks: np.ndarray) -> np.ndarray:
    """(T, 2) gaps of the lids over the width of their eye, over the same of frame 0."""
    places = landmarks[..., :2]
    gaps = []
    for corners, lids in zip(CORNERS, LIDS, strict=True):
        width = np.linalg.norm(places[:, corners[0]] - places[:, corners[1]], axis=-1)
        apart = [np.linalg.norm(places[:, upper] - places[:, lower], axis=-1) for upper, lower in lids]
        gaps.append(np.mean(apart, 0) / width)
    rows = np.stack(gaps, 1)
    return rows / rows[0]


def blinks(gaps: np.ndarray) -> Blinks:
    """The blinks in lid gaps (T, 2): both eyes close below SHUT and open above OPEN again within a second."""
    both = gaps.max(1)
    seen = both[~np.isnan(both)]
    count = complete = 0
    begin = None
    for frame, gap in enumerate(seen):
        if begin is None and gap < SHUT:
            begin = frame
        elif begin is not None and gap > OPEN:
            if frame - begin <= LONGEST_BLINK:
                count += 1
                complete += bool(seen[begin:frame].min() < WHOLLY)
            begin = None
    return Blinks(count, complete, len(seen))


def apart_share(gaps: np.ndarray) -> float:
    """Share of frames in which one eye is open and the other one shut; nan without a face."""
    seen = gaps[~np.isnan(gaps).any(1)]
    return float(((seen.min(1) < SHUT) & (seen.max(1) > OPEN)).mean()) if len(seen) else float("nan")


def gaze_apart(landmarks: np.ndarray, gaps: np.ndarray) -> float:
    """How far the two eyes look apart: 95th percentile over the frames with open eyes of the change since
    frame 0 of the difference of the irises' places between the corners, over the width of an eye."""
    places = landmarks[..., :2]
    along = []
    for corners, iris in zip(CORNERS, IRISES, strict=True):
        start, across = places[:, corners[0]], places[:, corners[1]] - places[:, corners[0]]
        along.append(((places[:, iris[0]] - start) * across).sum(1) / np.square(across).sum(1))
    apart = along[0] - along[1]
    wide = gaps.min(1) > WIDE_OPEN
    values = np.abs(apart - apart[0])[wide]
    return float(np.percentile(values, 95)) if len(values) else float("nan")


def iris_colours(frames: np.ndarray, landmarks: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(T, 3) median colours of the rings of both irises; nan where the eyes are not wide open."""
    colours = np.full((len(frames), 3), np.nan)
    rows, columns = np.indices(frames.shape[1:3]) + 0.5
    for number, (frame, points) in enumerate(zip(frames, landmarks, strict=True)):
        if not gaps[number].min() > WIDE_OPEN:
            continue
        picked = []
        for iris, lids in zip(IRISES, LIDS, strict=True):
            centre = points[iris[0], :2]
            radius = np.linalg.norm(points[list(iris[1:]), :2] - centre, axis=1).mean()
            away = np.hypot(columns - centre[0], rows - centre[1]) / radius
            upper, lower = points[lids[0][0], 1], points[lids[0][1], 1]
            ring = (away > RING[0]) & (away < RING[1]) & (rows > upper + 0.5) & (rows < lower - 0.5)
            picked.append(frame[ring])
        pixels = np.concatenate(picked)
        if len(pixels):
            colours[number] = np.median(pixels, axis=0)
    return colours


def blue_minus_red(colours: np.ndarray) -> float:
    """Mean of blue minus red of colours (T, 3); nan where all are."""
    values = colours[:, 2] - colours[:, 0]
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else float("nan")


def colour_loss(colours: np.ndarray) -> float:
    """Distance of the iris's colour in the last second from that of the portrait, over how far the portrait's
    is from grey; nan where either is not seen. Irises that are nearly grey have no colour to lose: nan."""
    first, last = colours[0], colours[-FPS:]
    seen = last[~np.isnan(last).any(1)]
    tint = first - first.mean()
    if np.isnan(first).any() or not len(seen) or np.linalg.norm(tint) < 12:
        return float("nan")
    end = seen.mean(0)
    return float(np.linalg.norm((end - end.mean()) - tint) / np.linalg.norm(tint))
