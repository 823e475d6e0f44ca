"""Warming up: the first request finds loaded models, compiled kernels and chosen algorithms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from omniavatar.engine.prepare import NO_TEXT, portrait_clip, shape_of
from omniavatar.engine.window_loop import WindowSampling
from omniavatar.errors import ConfigError
from omniavatar.plan.run import WindowShape, audio_rows, shape_windows
from omniavatar.sampling.passes import plan_passes
from omniavatar.sampling.schedule import Schedule
from omniavatar.types import Conditioning, StepPlan, Window

if TYPE_CHECKING:
    from omniavatar.engine.models import Models
    from omniavatar.engine.session import Session

WINDOWS = 2
"""The first one ends with a hand-over, the second begins with one."""


def warm_up(session: Session, size: tuple[int, int] | None = None) -> None:
    """Load the models and run one step of `WINDOWS` windows. Nothing is written.

    - size: (height, width); None means the first size of the configuration.

    Raises ConfigError for a size that the configuration lacks.
    """
    config, models = session.config, session.models
    size = size or config.video.sizes[0]
    if size not in config.video.sizes:
        known = ", ".join(f"{height}x{width}" for height, width in config.video.sizes)
        raise ConfigError(
            f"size: {size[0]}x{size[1]} is not a size of the configuration; use one of: {known}"
        )
    shape = shape_of(models, size, bool(models.dit_config.audio_dim))
    session.adopt(shape)
    conditioning = models.residency.retry(lambda: _blank(models, shape))
    first = Schedule(shape.schedule.sigmas[:1])
    passes = plan_passes(StepPlan((True,)), shape.branches, shape.has_audio)
    sparsity = None if shape.sparsity is None else shape.sparsity.of_step(shape.steps - 1)
    sampling = WindowSampling(
        config.sampling.seed,
        first,
        passes,
        config.sampling.sampler,
        shape.causal,
        shape.chunk,
        config.sampling.hand_over,
        config.video.color_match,
        sparsity,
    )
    if shape.causal is None:
        results = session.run_windows(sampling, conditioning, _windows(shape))
    else:
        results = session.block_session().run(sampling, conditioning, _windows(shape))
    for result in results:
        _ = result.frames  # waits


def _windows(shape: WindowShape) -> tuple[Window, ...]:
    new = shape.window_length - shape.overlap
    return shape_windows(shape, shape.window_length - 1 + (WINDOWS - 1) * new)[:WINDOWS]


@torch.inference_mode()
def _blank(models: Models, shape: WindowShape) -> Conditioning:
    """A grey portrait that is silent, with the negative prompt."""
    text = NO_TEXT
    if models.config.family.text:
        (text,) = models.prompts.embed((models.config.sampling.negative_prompt,))
    audio = None
    if shape.has_audio:
        rows = audio_rows(shape, _windows(shape))
        audio = np.zeros((rows, models.dit_config.audio_dim), dtype=np.float32)
        _ = models.audio_encoder  # loads it
    picture = torch.zeros(1, 3, *shape.size, device=models.device)
    reference = models.vae.encode(portrait_clip(picture, shape))
    return Conditioning(text, text, reference, audio, picture[:, :, None])
