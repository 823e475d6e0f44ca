"""Flow-matching noise levels and the two samplers.

`sigmas = linspace(1, 0, N+1)[:-1]`, shifted by `s -> shift*s / (1 + (shift-1)*s)`; a timestep is 1000 sigma.
Euler follows the predicted velocity. Re-noising (for few-step distilled weights: LCM, DMD, self-forcing)
predicts the clean sample `x0 = x - sigma*v` and mixes it with *fresh* noise at the next level.
Sources: Wan 2.1 (arXiv 2503.20314), flow matching (arXiv 2210.02747), LCM (arXiv 2310.04378).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from omniavatar.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the steps, descending in (0, 1]; the level after the last step is 0."""

    sigmas: tuple[float, ...]

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(1000.0 * sigma for sigma in self.sigmas)

    def __len__(self) -> int:
        return len(self.sigmas)

    def next_sigma(self, step: int) -> float:
        return self.sigmas[step + 1] if step + 1 < len(self.sigmas) else 0.0


def make_schedule(num_steps: int, shift: float, timesteps: tuple[float, ...] | None = None) -> Schedule:
    """The shifted schedule of `num_steps`, or exactly the `timesteps` (in (0, 1000], descending) given.

    Explicit timesteps are final: `shift` and `num_steps` do not act on them.
    """
    if timesteps is not None:
        if error := timesteps_error(timesteps):
            raise ConfigError(f"timesteps: {error}; got {timesteps}")
        return Schedule(tuple(t / 1000.0 for t in timesteps))
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"num_steps must be >= 1 and shift > 0, not {num_steps} and {shift}")
    linear = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    return Schedule(tuple(float(s) for s in shift * linear / (1.0 + (shift - 1.0) * linear)))


def timesteps_error(timesteps: tuple[float, ...]) -> str | None:
    """What is wrong with explicit timesteps; None if they are valid."""
    if not timesteps:
        return "must not be empty; leave the key out to use num_steps and shift"
    descending = all(a > b for a, b in itertools.pairwise(timesteps))
    if not descending or timesteps[0] > 1000 or timesteps[-1] <= 0:
        return "must descend strictly within (0, 1000], such as [1000, 750, 500, 250]"
    return None


def euler_step(sample: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One Euler step from `sigma` to `next_sigma`; tensors of one shape, float32."""
    return sample + velocity * (next_sigma - sigma)


def renoise_step(
    sample: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor | None
) -> Tensor:
    """Predict the clean sample and mix it with fresh `noise` at `next_sigma` (None only when that is 0)."""
    clean = sample - sigma * velocity
    if noise is None:
        return clean
    return (1.0 - next_sigma) * clean + next_sigma * noise
