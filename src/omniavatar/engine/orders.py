"""What the leader of several processes tells the others, between videos and never in the step loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from omniavatar.config.schema import SamplingConfig
from omniavatar.plan.sizes import Request
from omniavatar.types import Conditioning, StepPlan, Window


@dataclass(frozen=True)
class PlaceOrder:
    """Load the models for this request. identity: what of the leader's placement decides the frames."""

    request: Request
    identity: Mapping[str, str | int]


@dataclass(frozen=True, eq=False)
class WindowsOrder:
    """Make `windows[first:]`. Tensors are the leader's, on the host; audio rows come window by window.

    vae_latents: latents of a pass of the VAE, where all share it.
    """

    sampling: SamplingConfig
    text_positive: Tensor
    text_negative: Tensor
    reference_latent: Tensor
    audio_width: int | None
    step_plan: StepPlan
    windows: tuple[Window, ...]
    first: int
    given: Tensor | None
    vae_latents: int

    @classmethod
    def of(
        cls,
        sampling: SamplingConfig,
        conditioning: Conditioning,
        step_plan: StepPlan,
        windows: tuple[Window, ...],
        first: int,
        given: Tensor | None,
        vae_latents: int,
    ) -> WindowsOrder:
        return cls(
            sampling,
            conditioning.text_positive.cpu(),
            conditioning.text_negative.cpu(),
            conditioning.reference_latent.cpu(),
            None if conditioning.audio is None else conditioning.audio.shape[1],
            step_plan,
            windows,
            first,
            given,
            vae_latents,
        )


@dataclass(frozen=True)
class EndOrder:
    """No more videos."""
