"""Compares mouth openings measured by MediaPipe's face mesh with the truth, to find the limit of the measure.

`python training/measure_mouth.py FILE.npz` reads a file with `frames` uint8 (N, T, 3, H, W) and `opening`
(N, T). Run it in a separate environment (`mediapipe==0.10.21`, numpy 1.26, pillow).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

INNER_LIPS = (13, 14)
EYES = ((33, 133), (362, 263))
LAGS = (-2, -1, 0, 1, 2)
ENLARGED = 384


def openings(frames: np.ndarray) -> np.ndarray:
    """Gap of the inner lips over the distance of the eyes (T,), in uint8 (T, 3, H, W); nan: no face."""
    from mediapipe import solutions

    values = np.full(len(frames), np.nan)
    with solutions.face_mesh.FaceMesh(refine_landmarks=True, min_detection_confidence=0.3) as mesh:
        for number, frame in enumerate(frames):
            image = Image.fromarray(frame.transpose(1, 2, 0)).resize((ENLARGED, ENLARGED), Image.BICUBIC)
            found = mesh.process(np.ascontiguousarray(image)).multi_face_landmarks
            if found:
                points = np.array([(point.x, point.y) for point in found[0].landmark])
                eyes = [points[list(corners)].mean(0) for corners in EYES]
                gap = points[INNER_LIPS[0]] - points[INNER_LIPS[1]]
                values[number] = np.linalg.norm(gap) / np.linalg.norm(eyes[0] - eyes[1])
    return values


def correlations(read: np.ndarray, truth: np.ndarray) -> list[float]:
    """Correlation at each of LAGS, in frames by which the measurement is late."""
    result = []
    for lag in LAGS:
        moved = read[max(lag, 0) : len(read) + min(lag, 0)]
        still = truth[max(-lag, 0) : len(truth) + min(-lag, 0)]
        seen = ~np.isnan(moved)
        result.append(float(np.corrcoef(moved[seen], still[seen])[0, 1]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    arrays = np.load(parser.parse_args().file)
    for frames, truth in zip(arrays["frames"], arrays["opening"], strict=True):
        read = openings(frames)
        by_lag = "  ".join(
            f"{lag:+d} {r:.3f}" for lag, r in zip(LAGS, correlations(read, truth), strict=True)
        )
        print(f"faces {np.mean(~np.isnan(read)):.2f}  r at lag {by_lag}")


if __name__ == "__main__":
    main()
