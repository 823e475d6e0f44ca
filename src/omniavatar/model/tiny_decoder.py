"""TAEHV, a small decoder for the latents of Wan 2.1: 2-D convolutions, and one frame of memory in each block.

It has ten million weights instead of the full decoder's 73 million, a twentieth of its operations, and softer
pictures. It has no special first frame: every latent becomes four frames, and the first three of a clip are
dropped, so T latents become the 4T-3 frames of the full VAE. Two files of this form are published, and they
take different latents: `taew2_1.pth` (madebyollin/taehv) takes the normalised ones that the DiT works on,
`lighttaew2_1.pth` (lightx2v/Autoencoders) those of the full VAE. State-dict keys are those of the files'
decoder half. Source: github.com/madebyollin/taehv.

Shapes: B clips, n frames of the stage, T latents, C channels, h w latent pixels, H = 8h, W = 8w.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.model.vae import DecodeMore, denormalise

Memory = dict[nn.Module, Tensor]
FRAMES_A_LATENT = 4
LATENT_LIMIT = 3.0
BLOCKS_A_STAGE = 3


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Sizes of the decoder. widths: channels of its three stages and of the last convolutions."""

    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    z_dim: int = 16
    raw_latents: bool = False
    """It takes the full VAE's latents, not the normalised ones. The file does not tell."""
    latents_at_once: int = 2
    """Latents in a pass; memory grows with it."""


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and the frame before it, plus the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, frames_nCHW: Tensor, memory: Memory) -> Tensor:
        before = memory.get(self)
        if before is None:
            before = torch.zeros_like(frames_nCHW[:1])
        memory[self] = frames_nCHW[-1:].clone()
        past = torch.cat([before, frames_nCHW[:-1]])
        return F.relu_(self.conv(torch.cat([frames_nCHW, past], dim=1)).add_(frames_nCHW))


class Grow(nn.Module):
    """Makes `stride` frames of each frame, then doubles height and width.

    The file's order is the reverse. A 1x1 convolution may run before doubling, where it costs a quarter.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, frames_nCHW: Tensor) -> Tensor:
        return doubled(self.conv(frames_nCHW), self.stride)


def doubled(frames_nCHW: Tensor, stride: int) -> Tensor:
    """Frames (n * stride, C / stride, 2H, 2W), channels-last: each pixel four times.

    One copy splits the channels into frames and repeats the pixels. It moves words of eight bytes, several
    channels each: a copy of single numbers, or PyTorch's upsampling, takes several times as long on a GPU.
    """
    pixels_nHWC = frames_nCHW.permute(0, 2, 3, 1)
    dtype, channels = pixels_nHWC.dtype, pixels_nHWC.shape[3] // stride
    wide = pixels_nHWC.is_contiguous() and channels * dtype.itemsize % torch.int64.itemsize == 0
    wide = wide and not pixels_nHWC.requires_grad
    words = pixels_nHWC.view(torch.int64) if wide else pixels_nHWC
    split = words.unflatten(3, (stride, -1)).permute(0, 3, 1, 2, 4)
    repeated = split[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
    copied = repeated.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return (copied.view(dtype) if wide else copied).permute(0, 3, 1, 2)


class TinyDecoder(nn.Module):
    """Decodes latents to pixels; a `model.vae.VideoDecoder`."""

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, last = config.widths
        self.decoder = nn.ModuleList(
            [
                nn.Identity(),
                nn.Conv2d(config.z_dim, first, 3, padding=1),
                nn.ReLU(inplace=True),
                *_stage(first, second, 1),
                *_stage(second, third, 2),
                *_stage(third, last, 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(last, 3, 3, padding=1),
            ]
        )

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """Yield pixels (B, 3, n, H, W) float32 in [-1, 1] of normalised latents (B, 16, T, h, w) in order."""
        return self.begin_clip()(latent)

    def begin_clip(self) -> DecodeMore:
        """See `model.vae.WanVAE.begin_clip`."""
        memories: list[Memory] = []

        def decode(latent: Tensor) -> Iterator[Tensor]:
            z = denormalise(latent) if self.config.raw_latents else latent.float()
            z = (torch.tanh(z / LATENT_LIMIT) * LATENT_LIMIT).to(cast(Tensor, self.decoder[1].weight).dtype)
            for piece in z.split(self.config.latents_at_once, dim=2):
                first = not memories
                if first:
                    memories.extend({} for _ in piece)
                clips = [self._frames(clip, memory) for clip, memory in zip(piece, memories, strict=True)]
                pixels = torch.stack(clips).permute(0, 2, 1, 3, 4)
                yield pixels[:, :, FRAMES_A_LATENT - 1 :] if first else pixels

        return decode

    def _frames(self, latents_CThw: Tensor, memory: Memory) -> Tensor:
        """Pixels (4T, 3, H, W) float32 of some latents of one clip."""
        x = latents_CThw.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        for layer in self.decoder:
            x = layer(x, memory) if isinstance(layer, MemoryBlock) else layer(x)
        return x.float().clamp_(0.0, 1.0).mul_(2.0).sub_(1.0)


def _stage(width: int, next_width: int, stride: int) -> list[nn.Module]:
    """Blocks, `Grow` and the change of width; the Identity has the index of the doubling in the file."""
    return [
        *(MemoryBlock(width) for _ in range(BLOCKS_A_STAGE)),
        nn.Identity(),
        Grow(width, stride),
        nn.Conv2d(width, next_width, 3, padding=1, bias=False),
    ]
