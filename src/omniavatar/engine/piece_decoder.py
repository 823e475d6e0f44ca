"""Decodes the blocks of one video in order, and can begin again anywhere.

A decoder keeps what its convolutions saw of earlier latents. That state reaches back a fixed number of
latents (`accel.decoder.PictureDecoder.past_latents`). So it is not saved: decoding that many earlier latents
again gives the same state bit for bit, and so the same pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from omniavatar.model.vae import VideoDecoder


class PieceDecoder:
    """The decoder of one video.

    - past_blocks: earlier blocks on which the pixels of a block depend.
    """

    def __init__(self, decoder: VideoDecoder, past_blocks: int) -> None:
        self._decoder = decoder
        self._decode = decoder.begin_clip()
        self._whole = True
        self.past: deque[Tensor] = deque(maxlen=past_blocks)

    @torch.inference_mode()
    def __call__(self, latent: Tensor) -> Iterator[Tensor]:
        """Pixels (1, 3, n, H, W) float32, about [-1, 1], of the next block's latents, in pieces.

        If a call was not read to its end, the next one decodes the earlier blocks again first.
        """
        if not self._whole:
            self._begin_again()
        self._whole = False
        yield from self._decode(latent)
        self._whole = True
        self.past.append(latent)

    def go_on_after(self, latents: Iterable[Tensor]) -> None:
        """Let the next call follow these blocks, the newest last."""
        self.past.clear()
        self.past.extend(latents)
        self._whole = False

    def _begin_again(self) -> None:
        self._decode = self._decoder.begin_clip()
        for latent in self.past:
            for _ in self._decode(latent):
                pass
