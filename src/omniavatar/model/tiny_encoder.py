"""The encoder half of TAEHV: pixels to the latents of Wan 2.1, with 2-D convolutions and one frame of memory.

Four frames become one latent, the first frame of a clip included: latent 0 is frames 0 to 3, not frame 0
alone as in the causal VAE. A clip is filled up to a multiple of four by its last frame. Latents are the
normalised ones that the DiT works on. State-dict keys are those of the file's encoder half.
Source: github.com/madebyollin/taehv.

Shapes: B clips, N frames, T = ceil(N/4) latents, H W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from omniavatar.model.tiny_decoder import BLOCKS_A_STAGE, FRAMES_A_LATENT, Memory, MemoryBlock, TinyDecoder
from omniavatar.model.vae import DecodeMore

LATENTS_AT_ONCE = 2
"""Latents in a pass; memory grows with it."""
STRIDES = (2, 2, 1)
"""Frames of each stage that become one."""


class Shrink(nn.Module):
    """One frame of each `stride` frames by a 1x1 convolution over their channels, the earlier ones first."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, frames_nCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(frames_nCHW.unflatten(0, (-1, self.stride)).flatten(1, 2))
        return out


class TinyEncoder(nn.Module):
    """Encodes clips. width: channels of all stages."""

    def __init__(self, width: int = 64, z_dim: int = 16) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            [
                nn.Conv2d(3, width, 3, padding=1),
                nn.ReLU(inplace=True),
                *(layer for stride in STRIDES for layer in _stage(width, stride)),
                nn.Conv2d(width, z_dim, 3, padding=1),
            ]
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents (B, 16, T, h, w) float32 of pixels (B, 3, N, H, W) in [-1, 1]."""
        missing = -video.shape[2] % FRAMES_A_LATENT
        if missing:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        return torch.stack([self._latents(clip) for clip in video])

    def _latents(self, frames_CNHW: Tensor) -> Tensor:
        """Latents (16, T, h, w) of one clip."""
        dtype = cast(Tensor, self.encoder[0].weight).dtype
        memory: Memory = {}
        pieces = []
        for piece in frames_CNHW.split(FRAMES_A_LATENT * LATENTS_AT_ONCE, dim=1):
            unit = (piece.transpose(0, 1) + 1.0) / 2.0
            x = unit.to(dtype).contiguous(memory_format=torch.channels_last)
            for layer in self.encoder:
                x = layer(x, memory) if isinstance(layer, MemoryBlock) else layer(x)
            pieces.append(x.float())
        return torch.cat(pieces).transpose(0, 1).contiguous()


class TinyVAE:
    """TAEHV in both directions; a `model.vae.VideoVAE` without the full VAE."""

    def __init__(self, encoder: TinyEncoder, decoder: TinyDecoder) -> None:
        self.encoder, self.decoder = encoder, decoder

    def encode(self, video: Tensor) -> Tensor:
        """See `TinyEncoder.encode`."""
        return self.encoder.encode(video)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """See `TinyDecoder.decode_stream`."""
        return self.decoder.decode_stream(latent)

    def begin_clip(self) -> DecodeMore:
        """See `model.vae.WanVAE.begin_clip`."""
        return self.decoder.begin_clip()


def _stage(width: int, stride: int) -> list[nn.Module]:
    """Fewer frames, half the height and width, then blocks."""
    return [
        Shrink(width, stride),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        *(MemoryBlock(width) for _ in range(BLOCKS_A_STAGE)),
    ]
