"""Whole videos of one configuration: the time they take, and what the step cache does to the picture.

The portrait is the packaged one, cut to the first configured size. Models are loaded and the prompt is
embedded before the clock starts. The baseline is the same model, steps, guidance and seed with every step
computed. Quality compares the finished video with the baseline's, and only with weights from files: random
weights make noise, whose PSNR says nothing about faces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from omniavatar.assets import PORTRAIT
from omniavatar.encoders.image import prepare_image
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.prepare import shape_of
from omniavatar.engine.window_loop import to_uint8
from omniavatar.measure.benchmark.rows import WholeVideo
from omniavatar.measure.quality import Quality, compare
from omniavatar.media.audio import measure_audio
from omniavatar.media.image import load_image
from omniavatar.media.inspect import read_frames
from omniavatar.media.temporary import temporary_folder
from omniavatar.types import AvatarRequest, LocalAudio, SamplingParams

PROMPT = "A woman in a blue sweater speaks into the camera, soft daylight"


def packaged_portrait(size: tuple[int, int]) -> np.ndarray:
    """The portrait that ships with the package, cut to (height, width): (H, W, 3) uint8."""
    pixels = prepare_image(load_image(PORTRAIT), size)
    return to_uint8((pixels[:, :, None] + 1) / 2)[0]


def measure_whole(
    pipeline: AvatarPipeline, voice: LocalAudio, predicted: Callable[[float], float]
) -> WholeVideo:
    """Make the video, and the baseline where a step cache is configured.

    predicted: projected seconds for a number of seconds of audio.
    """
    config = pipeline.config
    models = pipeline.models
    pipeline.adopt(shape_of(models, config.video.sizes[0], True))
    if config.family.text:
        models.prompts.embed([PROMPT, config.sampling.negative_prompt])
    request = AvatarRequest(PROMPT, packaged_portrait(config.video.sizes[0]), voice)
    audio = measure_audio(voice, config.video.sample_rate, 0.0).samples / config.video.sample_rate
    baseline_seconds: float | None = None
    quality: Quality | None = None
    with temporary_folder() as folder:
        result = pipeline.generate(request, folder / "video.mp4", resume=False)
        if config.sampling.cache_policy != "none":
            plain = replace(request, sampling=SamplingParams(step_cache="none"))
            reference = pipeline.generate(plain, folder / "baseline.mp4", resume=False)
            baseline_seconds = reference.seconds
            if config.model.weights == "files":
                quality = compare(read_frames(result.output), read_frames(reference.output))
    expected = predicted(audio)
    return WholeVideo(
        seconds=result.seconds,
        video_seconds=result.frames / config.video.fps,
        windows=result.windows,
        predicted_seconds=expected,
        prediction_error=expected / result.seconds - 1,
        baseline_seconds=baseline_seconds,
        quality=quality,
    )


def sparse_quality(pipeline: AvatarPipeline, voice: LocalAudio) -> Quality:
    """The first window with sparse attention, compared with the same window with dense attention."""
    config = pipeline.config
    request = AvatarRequest(PROMPT, packaged_portrait(config.video.sizes[0]), voice)
    with pipeline.prepare(request) as ready:
        made = []
        for sparsity in (ready.plan.sparsity, None):
            sampling = replace(ready.window_sampling, sparsity=sparsity)
            (result,) = pipeline.window_generator(sampling, ready.conditioning).run(ready.plan.windows[:1])
            made.append(np.concatenate(result.frames))
    return compare(*made)
