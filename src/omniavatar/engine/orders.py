"""Orders from the leader to the other ranks. They are sent between videos, never in the step loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omniavatar.engine.window_loop import WindowSampling
from omniavatar.plan.run import WindowShape
from omniavatar.types import Conditioning, Window

if TYPE_CHECKING:
    from omniavatar.engine.shown import Shown


@dataclass(frozen=True)
class PlaceOrder:
    """Load the models for windows of `shape`.

    - identity: the values of the leader's placement that decide the frames.
    """

    shape: WindowShape
    identity: Mapping[str, str | int]


@dataclass(frozen=True, eq=False)
class WindowsOrder:
    """Make `windows[first:]`. The leader sends its tensors on the host, and audio rows window by window.

    - audio_width: numbers in an audio row; None for a silent video.
    - given: given latents of window `first`; None if `first` is 0.
    - shown: what the pictures before window `first` left (`WindowResult.shown`).
    - vae_latents: latents of one VAE pass, for ranks that share the VAE.
    - stoppable: before each step, all ranks ask the leader whether to go on.
    - portrait: see `types.Conditioning`.
    """

    sampling: WindowSampling
    text_positive: Tensor
    text_negative: Tensor
    reference_latent: Tensor
    audio_width: int | None
    windows: Sequence[Window]
    first: int
    given: Tensor | None
    vae_latents: int
    stoppable: bool = False
    portrait: Tensor | None = None
    shown: Shown | None = None

    @classmethod
    def of(
        cls,
        sampling: WindowSampling,
        conditioning: Conditioning,
        windows: Sequence[Window],
        first: int,
        given: Tensor | None,
        vae_latents: int,
        stoppable: bool = False,
        shown: Shown | None = None,
    ) -> WindowsOrder:
        return cls(
            sampling,
            conditioning.text_positive.cpu(),
            conditioning.text_negative.cpu(),
            conditioning.reference_latent.cpu(),
            None if conditioning.audio is None else conditioning.audio.shape[1],
            windows,
            first,
            given,
            vae_latents,
            stoppable,
            None if conditioning.portrait is None else conditioning.portrait.cpu(),
            shown,
        )

    def conditioning(self, device: torch.device) -> Conditioning:
        """The leader's conditioning, without audio rows, on this rank's device."""
        width = self.audio_width
        return Conditioning(
            self.text_positive.to(device),
            self.text_negative.to(device),
            self.reference_latent.to(device),
            None if width is None else np.empty((0, width), dtype=np.float32),
            self.portrait,
        )


@dataclass(frozen=True)
class EndOrder:
    """No more videos."""
