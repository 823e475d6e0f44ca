"""Make one video from a portrait and a voice.

python examples/one_video.py --config pocket --image examples/head.png --audio examples/speech.flac
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omniavatar import AvatarPipeline, AvatarRequest, RunResult, SamplingParams

HERE = Path(__file__).parent


def make_video(config: str, prompt: str, image: Path, audio: Path, output: Path) -> RunResult:
    """Write the video to `output` and a JSON file with its settings and times beside it."""
    pipeline = AvatarPipeline.from_config(config)
    request = AvatarRequest(prompt, image, audio, SamplingParams(seed=1))
    return pipeline.generate(request, output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make one video from a portrait and a voice.")
    parser.add_argument("--config", default="pocket", help="a YAML file, or pocket for the packaged model")
    parser.add_argument("--prompt", default="A person is talking to the camera, smiling, still")
    parser.add_argument("--image", type=Path, default=HERE / "head.png")
    parser.add_argument("--audio", type=Path, default=HERE / "speech.flac")
    parser.add_argument("--output", type=Path, default=Path("one_video.mp4"))
    options = parser.parse_args()
    result = make_video(options.config, options.prompt, options.image, options.audio, options.output)
    print(f"{result.output}: {result.frames} frames in {result.seconds:.1f} s; settings in {result.sidecar}")


if __name__ == "__main__":
    main()
