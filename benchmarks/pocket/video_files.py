"""Reads and writes the benchmark's videos: H.264 as the engine writes it, at one quality."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from omniavatar.media.atomic import atomic_path

FPS = 25
CRF = 10
PRESET = "medium"


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write frames, uint8 (T, H, W, 3), without sound, coded like the engine's videos of this benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(CRF), "preset": PRESET}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_video(path: Path) -> np.ndarray:
    """The frames, uint8 (T, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
