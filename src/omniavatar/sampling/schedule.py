"""Flow-matching noise levels.

`sigmas = linspace(1, 0, N+1)[:-1]`, shifted by `s -> shift*s / (1 + (shift-1)*s)`; a timestep is 1000 sigma.
Sources: Wan 2.1 (arXiv 2503.20314), flow matching (arXiv 2210.02747).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from omniavatar.errors import ConfigError


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
    """The shifted schedule of `num_steps`, or that of explicit `timesteps` (descending, in (0, 1000]).

    With explicit timesteps `shift` and `num_steps` have no effect.
    """
    if timesteps is not None:
        if error := timesteps_error(timesteps):
            raise ConfigError(f"timesteps: {error}; got {timesteps}")
        return Schedule(tuple(t / 1000.0 for t in timesteps))
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"num_steps must be >= 1 and shift > 0, not {num_steps} and {shift}")
    import numpy as np

    linear = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    return Schedule(tuple(float(s) for s in shift * linear / (1.0 + (shift - 1.0) * linear)))


DISTILLED = {2: (1000.0, 500.0), 4: (1000.0, 750.0, 500.0, 250.0)}
"""Timesteps before the shift, by the number of steps, that step-distilled models were trained with."""


def distilled_schedule(num_steps: int, shift: float, whole: bool) -> Schedule:
    """The schedule of SoulX-FlashHead, and of LeapTalk with `whole` timesteps before the shift.

    Numbers of steps that `DISTILLED` lacks are spread from 1000 to 1. Raises ConfigError.
    """
    if num_steps < 1 or shift <= 0:
        raise ConfigError(f"num_steps must be >= 1 and shift > 0, not {num_steps} and {shift}")
    base = DISTILLED.get(num_steps)
    if base is None:
        import numpy as np

        spread = np.linspace(1000.0, 1.0, num_steps)
        base = tuple(dict.fromkeys(float(t) for t in (np.rint(spread) if whole else spread)))
    levels = (t / 1000.0 for t in base)
    return Schedule(tuple(shift * level / (1.0 + (shift - 1.0) * level) for level in levels))


def timesteps_error(timesteps: tuple[float, ...]) -> str | None:
    """What is wrong with explicit timesteps; None if they are valid."""
    if not timesteps:
        return "must not be empty; leave the key out to use num_steps and shift"
    descending = all(a > b for a, b in itertools.pairwise(timesteps))
    if not descending or timesteps[0] > 1000 or timesteps[-1] <= 0:
        return "must descend strictly within (0, 1000], such as [1000, 750, 500, 250]"
    return None
