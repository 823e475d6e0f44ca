"""What an adapter gets and gives; docs/peers.md says how to write one.

An adapter is a module with `build(sizes, option)`. It makes the engine's models with random weights of the
given sizes on the given device, and returns the parts that it has: `forward` (one pass of the transformer),
`decode` (a window's latents to pixels), `encode` (13 frames to latents). Each part is a function without
arguments; `peers` times it. `PACKAGES` names the distributions whose versions belong to the times. `option`
is what follows the colon in `--engines NAME:OPTION`, empty without one; an unknown one raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from omniavatar.checkpoint.layout import ScaleSpec, scale_spec
from omniavatar.device import torch_dtype

ENCODED_FRAMES = 13
Parts = dict[str, Callable[[], Any]]
PARTS = ("forward", "decode", "encode")


@dataclass(frozen=True)
class Sizes:
    """What is to be built.

    - scale: nano, 1.3B or 14B. latent: (T, h, w) of a window.
    - device: as torch names it. dtype: bf16, fp16 or fp32.
    """

    scale: str
    latent: tuple[int, int, int]
    device: str
    dtype: str

    @property
    def spec(self) -> ScaleSpec:
        """All sizes of the model."""
        return scale_spec(self.scale)

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        return 8 * self.latent[1], 8 * self.latent[2]

    def noise(self, *shape: int) -> torch.Tensor:
        """Random numbers in float32 on the device; equal for equal shapes."""
        generator = torch.Generator(self.torch_device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self.torch_device)
