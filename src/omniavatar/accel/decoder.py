"""Smaller decoders by name. What changes: latents become pixels in another network; encoding stays the full
VAE's, which the hand-over between windows needs (it encodes pixels, whoever made them).

| name | file | what it is |
|---|---|---|
| lightvae | `lightvaew2_1.pth` (lightx2v/Autoencoders) | the full VAE with a quarter of the channels |
| taehv | `taew2_1.pth` (madebyollin/taehv) | TAEHV, see `model.tiny_decoder` |
| lighttae | `lighttaew2_1.pth` (lightx2v/Autoencoders) | TAEHV on the full VAE's own latents |

What it loses: detail, by the publishers' comparisons least with lightvae; and what a decoder blurs is handed
over to the next window. Sources: github.com/madebyollin/taehv, github.com/ModelTC/LightX2V.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omniavatar.model.tiny_decoder import TinyDecoder
from omniavatar.model.vae import VideoDecoder, VideoVAE


def apply_decoder(vae: VideoVAE, decoder: VideoDecoder) -> VideoVAE:
    """`vae` with `decoder` in the place of its own; a `TinyDecoder`'s weights become channels-last."""
    if isinstance(decoder, TinyDecoder):
        decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return OtherDecoder(vae, decoder)


class OtherDecoder:
    """Encodes with one network and decodes with another."""

    def __init__(self, vae: VideoVAE, decoder: VideoDecoder) -> None:
        self.vae, self.decoder = vae, decoder

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of the full VAE, see `model.vae.WanVAE.encode`."""
        return self.vae.encode(video)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """Pixels of the other decoder, see `model.vae.WanVAE.decode_stream`."""
        return self.decoder.decode_stream(latent)
