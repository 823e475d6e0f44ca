"""Writes the landmarks of every frame of some videos, by MediaPipe's face mesh.

Runs in the environment that `faces.py` makes, and needs mediapipe with its OpenCV and numpy.
`read_faces.py OUT_DIR VIDEO...` writes `OUT_DIR/NAME.npy` for each video or picture: float32 (T, 478, 3), x
and y in pixels and depth on the same scale, nan where no face was found.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

ENLARGED = 384
POINTS = 478


def frames_of(path: Path):
    """RGB frames."""
    if path.suffix == ".png":
        yield cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return
    video = cv2.VideoCapture(str(path))
    while True:
        read, frame = video.read()
        if not read:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def landmarks(path: Path) -> np.ndarray:
    """(T, 478, 3) of one video. The mesh follows a face from frame to frame, so each video has its own."""
    from mediapipe import solutions

    rows = []
    still = path.suffix == ".png"
    with solutions.face_mesh.FaceMesh(
        static_image_mode=still, refine_landmarks=True, min_detection_confidence=0.3
    ) as mesh:
        for frame in frames_of(path):
            height, width = frame.shape[:2]
            large = cv2.resize(frame, (ENLARGED, ENLARGED), interpolation=cv2.INTER_CUBIC)
            found = mesh.process(large).multi_face_landmarks
            if found:
                points = [(mark.x * width, mark.y * height, mark.z * width) for mark in found[0].landmark]
                rows.append(np.array(points, np.float32))
            else:
                rows.append(np.full((POINTS, 3), np.nan, np.float32))
    return np.stack(rows)


def main() -> None:
    out, *videos = (Path(word) for word in sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for video in videos:
        partial = out / f"{video.stem}.partial"
        with partial.open("wb") as file:
            np.save(file, landmarks(video))
        partial.replace(out / f"{video.stem}.npy")


if __name__ == "__main__":
    main()
