"""The detector of faces: BlazeFace, the full-range model of MediaPipe (Google, Apache-2.0), unchanged.

It is `face_detection_full_range_sparse.tflite` of the package mediapipe 0.10.21, whose later versions contain
no models.
"""

from __future__ import annotations

from pathlib import Path

DETECTOR = Path(__file__).with_name("face_detection_full_range_sparse.tflite")
