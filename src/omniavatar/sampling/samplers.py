"""Samplers by name: how a step gets from one noise level to the next.

Euler follows the predicted velocity. Re-noising (for few-step distilled weights: LCM, DMD, self-forcing)
predicts the clean sample `x0 = x - sigma*v` and mixes it with *fresh* noise at the next level. Causal does
the same for a block-causal model, whose video is made in blocks instead of overlapping windows. Bridge starts
from the portrait's latents instead of noise; its last step goes a thousandth beyond level 0.
Sources: flow matching (arXiv 2210.02747), LCM (arXiv 2310.04378), LeapTalk (its inference code).

`create` takes nothing and returns a `SamplerStep`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from omniavatar.device import Backend, Registry

if TYPE_CHECKING:
    from torch import Tensor


class SamplerStep(Protocol):
    """The sample at `next_sigma`, from the sample and the velocity at `sigma`; tensors of one shape, float32.

    noise: fresh noise; None for the last step, and for a sampler without `fresh_noise`.
    """

    def __call__(
        self, sample: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor | None
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Sampler(Backend):
    """A sampler.

    - fresh_noise: it draws noise for every step but the last.
    - causal: the model makes blocks from a cache of earlier blocks (`sampling.causal`).
    - from_portrait: a window starts from the given latents and the portrait's, not from noise.
    """

    fresh_noise: bool = False
    causal: bool = False
    from_portrait: bool = False


def euler_step(
    sample: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor | None = None
) -> Tensor:
    """One Euler step, see `SamplerStep`."""
    return sample + velocity * (next_sigma - sigma)


def renoise_step(
    sample: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor | None
) -> Tensor:
    """The predicted clean sample mixed with fresh `noise`, see `SamplerStep`."""
    clean = sample - sigma * velocity
    if noise is None:
        return clean
    return (1.0 - next_sigma) * clean + next_sigma * noise


BRIDGE_END = -0.001
"""Level after a bridge's last step. LeapTalk's own code ends there; its training estimate ends at 0."""


def bridge_step(
    sample: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Tensor | None
) -> Tensor:
    """One step of the bridge from the portrait to the clip, see `SamplerStep`."""
    change = (next_sigma or BRIDGE_END) - sigma
    rest = sigma - BRIDGE_END
    moved = sample + change * velocity
    if noise is None:
        return moved
    return moved + math.sqrt(max(0.0, -change * (rest + change) / rest)) * noise


SAMPLERS: Registry[Sampler] = Registry(
    "sampling.sampler",
    Sampler(
        name="euler",
        create=lambda: euler_step,
        exact=True,
        doc="Follows the predicted velocity, as the original does.",
    ),
    Sampler(
        name="renoise",
        create=lambda: renoise_step,
        exact=False,
        doc="Predicts the clean sample and adds fresh noise, for step-distilled LoRAs.",
        fresh_noise=True,
    ),
    Sampler(
        name="causal",
        create=lambda: renoise_step,
        exact=False,
        doc="Re-noising in blocks that see a cache of earlier blocks, for block-causal models (LiveTalk).",
        fresh_noise=True,
        causal=True,
    ),
    Sampler(
        name="bridge",
        create=lambda: bridge_step,
        exact=False,
        doc="From the portrait's latents to the clip, in one step without noise (LeapTalk).",
        fresh_noise=True,
        from_portrait=True,
    ),
)
