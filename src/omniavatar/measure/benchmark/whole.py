"""Whole videos of one configuration: the time they take, and what the step cache does to the picture.

The packaged portrait, cut to the first configured size; models loaded and the prompt embedded before the
clock starts. The baseline is the same model, steps, guidance and seed with every step computed; quality is
the finished video against the baseline's, and is measured only where the weights come from files: random
ones make noise, whose PSNR says nothing about faces.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from omniavatar.encoders.image import prepare_image
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.window_loop import to_uint8
from omniavatar.measure.quality import compare
from omniavatar.media.audio import measure_audio
from omniavatar.media.image import load_image
from omniavatar.media.inspect import read_frames
from omniavatar.plan.run import window_shape
from omniavatar.types import AudioInput, AvatarRequest, SamplingParams

PROMPT = "A woman in a blue sweater speaks into the camera, soft daylight"


def packaged_portrait(size: tuple[int, int]) -> np.ndarray:
    """The portrait that ships with the package, cut to (height, width): (H, W, 3) uint8."""
    with as_file(files("omniavatar.assets")) as assets:
        pixels = prepare_image(load_image(assets / "portrait.png"), size)
    return to_uint8((pixels[:, :, None] + 1) / 2)[0]


def measure_full(
    pipeline: AvatarPipeline, voice: AudioInput, predicted: Callable[[float], float]
) -> dict[str, Any]:
    """Seconds of the video and of the baseline's, PSNR and SSIM between them, and the prediction's error.

    predicted: seconds that the quick measurement foretells for so many
    seconds of audio.
    """
    config = pipeline.config
    pipeline.adopt(window_shape(config, config.video.sizes[0], has_audio=True))
    pipeline.models.prompts.embed([PROMPT, config.sampling.negative_prompt])
    request = AvatarRequest(PROMPT, packaged_portrait(config.video.sizes[0]), voice)
    audio = measure_audio(voice, config.video.sample_rate, 0.0).samples / config.video.sample_rate
    with tempfile.TemporaryDirectory(prefix="omniavatar-") as folder:
        result = pipeline.generate(request, Path(folder) / "video.mp4", resume=False)
        expected = predicted(audio)
        row: dict[str, Any] = {
            "seconds": result.seconds,
            "video_seconds": result.frames / config.video.fps,
            "windows": result.windows,
            "predicted_seconds": expected,
            "prediction_error": expected / result.seconds - 1,
            "baseline_seconds": None,
            "quality": None,
        }
        if config.sampling.cache_policy != "none":
            plain = replace(request, sampling=SamplingParams(step_cache="none"))
            reference = pipeline.generate(plain, Path(folder) / "baseline.mp4", resume=False)
            row["baseline_seconds"] = reference.seconds
            if config.model.weights == "files":
                quality = compare(read_frames(result.output), read_frames(reference.output))
                row["quality"] = asdict(quality)
    return row
