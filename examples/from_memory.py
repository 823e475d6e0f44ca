"""Make frames from a picture and a sound that are already in memory, such as the output of a speech program.

python examples/from_memory.py --config pocket --image examples/head.png --output talking.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from omniavatar import AvatarPipeline, AvatarRequest, Waveform

HERE = Path(__file__).parent
RATE = 16000


def hum(seconds: float) -> Waveform:
    """A hum with the rhythm of syllables; put the samples of your speech program here."""
    times = np.arange(round(seconds * RATE)) / RATE
    tone = np.sign(np.sin(2 * np.pi * 140 * times)) * np.clip(np.sin(2 * np.pi * 3 * times), 0, 1)
    return Waveform((0.2 * tone).astype(np.float32), RATE)


def make_frames(config: str, portrait: Image.Image, voice: Waveform) -> np.ndarray:
    """All frames of the video, (frames, height, width, 3) uint8 RGB."""
    pipeline = AvatarPipeline.from_config(config)
    request = AvatarRequest("A person is talking to the camera, smiling, still", portrait, voice)
    return np.concatenate([chunk.frames for chunk in pipeline.stream(request)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an animated GIF from a picture and a sound in memory.")
    parser.add_argument("--config", default="pocket", help="a YAML file, or pocket for the packaged model")
    parser.add_argument("--image", type=Path, default=HERE / "head.png")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--output", type=Path, default=Path("talking.gif"))
    options = parser.parse_args()
    with Image.open(options.image) as portrait:
        frames = make_frames(options.config, portrait, hum(options.seconds))
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(options.output, save_all=True, append_images=pictures[1:], duration=40, loop=0)
    print(f"{options.output}: {len(pictures)} frames")


if __name__ == "__main__":
    main()
