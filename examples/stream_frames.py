"""Play frames while the video is still being made. This player writes PNG files; put your own in its place.

python examples/stream_frames.py --config pocket --frames frames
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from omniavatar import AvatarPipeline, AvatarRequest

HERE = Path(__file__).parent


class PngPlayer:
    """Shows a frame by writing it to a folder. A window, a WebRTC track or a pipe has the same method."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def show(self, frame: np.ndarray, seconds: float) -> None:
        """frame: (height, width, 3) uint8 RGB; seconds: its time in the video."""
        Image.fromarray(frame).save(self.folder / f"{round(seconds * 1000):08d}ms.png")


def play(config: str, request: AvatarRequest, player: PngPlayer) -> int:
    """Show every frame as soon as its window is finished; returns the number of frames."""
    pipeline = AvatarPipeline.from_config(config)
    started, shown = time.perf_counter(), 0
    for chunk in pipeline.stream(request):
        for frame, seconds in zip(chunk.frames, chunk.times, strict=True):
            player.show(frame, float(seconds))
        shown += len(chunk.frames)
        elapsed = time.perf_counter() - started
        print(f"window {chunk.window + 1} of {chunk.windows}: {shown} frames after {elapsed:.1f} s")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Play frames while the video is being made.")
    parser.add_argument("--config", default="pocket", help="a YAML file, or pocket for the packaged model")
    parser.add_argument("--image", type=Path, default=HERE / "head.png")
    parser.add_argument("--audio", type=Path, default=HERE / "speech.flac")
    parser.add_argument("--frames", type=Path, default=Path("frames"), help="folder of the PNG files")
    options = parser.parse_args()
    request = AvatarRequest("A person is talking to the camera, still", options.image, options.audio)
    play(options.config, request, PngPlayer(options.frames))


if __name__ == "__main__":
    main()
