"""The denoising loop of one window.

The loop knows neither the model nor the guidance: `velocity(sample, step)` returns the guided velocity.
Given latents (the portrait, or the end of the window before) are written over the sample before every step
and once after the last. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from omniavatar.sampling.schedule import Schedule, euler_step, renoise_step
from omniavatar.types import Sampler

Velocity = Callable[[Tensor, int], Tensor]


def noises_drawn(schedule: Schedule, sampler: Sampler) -> int:
    """How often `denoise` draws noise for a window."""
    later = sum(1 for step in range(len(schedule)) if schedule.next_sigma(step))
    return 1 + (later if sampler == "renoise" else 0)


def denoise(
    velocity: Velocity,
    schedule: Schedule,
    given: Tensor,
    draw_noise: Callable[[], Tensor],
    sampler: Sampler = "euler",
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, 16, T, h, w) of a window.

    given: (B, 16, G, h, w) known leading latents. draw_noise: float32 noise of the window's shape, called
    once for the start and, when re-noising, once before every later step. on_step: told each finished step.
    """
    known = given.shape[2]
    sample = draw_noise().float()
    for step, sigma in enumerate(schedule.sigmas):
        sample[:, :, :known] = given
        predicted = velocity(sample, step)
        next_sigma = schedule.next_sigma(step)
        if sampler == "euler":
            sample = euler_step(sample, predicted, sigma, next_sigma)
        else:
            sample = renoise_step(sample, predicted, sigma, next_sigma, draw_noise() if next_sigma else None)
        if on_step is not None:
            on_step(step)
    sample[:, :, :known] = given
    return sample
