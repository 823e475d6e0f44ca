"""The video VAE on a separate device, so that it decodes while the other device computes the next block.

What changes: inputs are copied to the VAE's device, and latents that it encodes come back; pixels stay there.
Copies between GPUs are queued on both, so the host does not wait.
What it loses: nothing; the same kernels run on the same values.
Limits: the next block must not depend on the pixels. So it gains time with block-causal models only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from omniavatar.model.vae import DecodeMore, VideoVAE


class VAEElsewhere:
    """`vae`, whose weights lie on `device`, for callers whose latents lie on another one."""

    def __init__(self, vae: VideoVAE, device: torch.device) -> None:
        self._vae, self._device = vae, device

    def encode(self, video: Tensor) -> Tensor:
        """See `WanVAE.encode`; the latents lie where `video` does."""
        with self._current():
            return self._vae.encode(video.to(self._device)).to(video.device)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """See `WanVAE.decode_stream`; the pixels stay on the VAE's device."""
        yield from self.begin_clip()(latent)

    def begin_clip(self) -> DecodeMore:
        """See `WanVAE.begin_clip`; the pixels stay on the VAE's device."""
        with self._current():
            decode_more = self._vae.begin_clip()

        def decode(latent: Tensor) -> Iterator[Tensor]:
            pieces = decode_more(latent.to(self._device, non_blocking=True))
            while True:
                with self._current():  # not around the yield: the caller's kernels are for its own device
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece

        return decode

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches its kernels on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
