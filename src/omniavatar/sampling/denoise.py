"""The denoising loop of one window.

The loop knows neither the model nor the guidance: `velocity(sample, step)` returns the guided velocity.
Given latents (the portrait, or the end of the previous window) are written over the sample before every step
and once after the last. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from omniavatar.sampling.samplers import SAMPLERS, SamplerStep
from omniavatar.sampling.schedule import Schedule

Velocity = Callable[[Tensor, int], Tensor]


def noises_drawn(schedule: Schedule, sampler: str) -> int:
    """How often `denoise` draws noise for a window."""
    chosen = SAMPLERS.get(sampler)
    later = sum(1 for step in range(len(schedule)) if schedule.next_sigma(step))
    return (0 if chosen.from_portrait else 1) + (later if chosen.fresh_noise else 0)


def denoise(
    velocity: Velocity,
    schedule: Schedule,
    given: Tensor,
    draw_noise: Callable[[], Tensor],
    sampler: str = "euler",
    on_step: Callable[[int, Tensor], None] | None = None,
    portrait: Tensor | None = None,
) -> Tensor:
    """Latents (B, 16, T, h, w) of a window.

    - given: (B, 16, G, h, w) known leading latents.
    - draw_noise: returns float32 noise of the window's shape. It is called once for the start, and once for
      every later step if the sampler needs fresh noise.
    - on_step: called with the number of each finished step, and its sample.
    - portrait: (B, 16, T, h, w), the start of a sampler that takes no noise for it.
    """
    chosen = SAMPLERS.get(sampler)
    advance: SamplerStep = chosen.create()
    known = given.shape[2]
    if chosen.from_portrait:
        assert portrait is not None
        sample = portrait.float().clone()
    else:
        sample = draw_noise().float()
    for step, sigma in enumerate(schedule.sigmas):
        sample[:, :, :known] = given
        predicted = velocity(sample, step)
        next_sigma = schedule.next_sigma(step)
        noise = draw_noise() if next_sigma and chosen.fresh_noise else None
        sample = advance(sample, predicted, sigma, next_sigma, noise)
        if on_step is not None:
            on_step(step, sample)
    sample[:, :, :known] = given
    return sample
