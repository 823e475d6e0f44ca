"""Noise that depends on the request's seed and the window alone: not on device, batch, or what ran before.

Drawn on the CPU with numpy's Philox generator, whose stream is the same on every machine. The initial noise
is drawn first, then the fresh noises of a re-noising sampler, so a window can be repeated by itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from omniavatar.ops.transfer import upload


class WindowNoise:
    """Standard normal tensors of one window of one request, float32 on `device`."""

    def __init__(self, seed: int, window: int, shape: tuple[int, ...], device: torch.device) -> None:
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, window))))
        self._shape = shape
        self._device = device

    def draw(self) -> Tensor:
        """The next noise tensor of the window."""
        values = self._generator.standard_normal(self._shape, dtype=np.float32)
        return upload(torch.from_numpy(values), self._device)
