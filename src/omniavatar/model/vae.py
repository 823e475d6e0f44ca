"""The causal video VAE of Wan 2.1: 8x8 spatial and 4x temporal compression, 16 latent channels.

A clip of 4T-3 frames becomes T latents; the first frame is coded alone. `decode_stream` yields pixels as it
decodes and keeps only the causal history (two frames for each convolution), so memory does not grow with
length. Latents are always *normalised* by the published mean and standard deviation; pixels are in [-1, 1]
(not clamped). State-dict keys are those of `Wan2.1_VAE.pth`. Source: Wan 2.1 (arXiv 2503.20314).

Shapes: B batch, N = 4T-3 video frames, T latent frames, H W pixels, h w = H/8 W/8.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from omniavatar.device import upload
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.vae_layers import (
    CausalConv3d,
    CausalState,
    ChannelRMSNorm,
    Downsample,
    FrameAttention,
    ResidualBlock,
    Upsample,
)

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


class Encoder(nn.Module):
    """Pixels (B, 3, N, H, W) to mean and log variance (B, 2*z_dim, T, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3, widths[0], (3, 3, 3))
        stages: list[nn.Module] = []
        for level, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            for block in range(config.num_res_blocks):
                stages.append(ResidualBlock(width_in if block == 0 else width_out, width_out))
            if level < len(config.temporal_downsample):
                stages.append(Downsample(width_out, config.temporal_downsample[level]))
        self.downsamples = nn.ModuleList(stages)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        x = self.conv1(x, state)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, state)
        return _apply_head(self.head, x, state)


class Decoder(nn.Module):
    """Latents (B, z_dim, T, h, w) to pixels (B, 3, N, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        temporal_upsample = tuple(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        stages: list[nn.Module] = []
        for level, (previous, width) in enumerate(itertools.pairwise(widths)):
            halved = previous if level == 0 else previous // 2
            for block in range(config.num_res_blocks + 1):
                stages.append(ResidualBlock(halved if block == 0 else width, width))
            if level < len(temporal_upsample):
                stages.append(Upsample(width, temporal_upsample[level]))
        self.upsamples = nn.ModuleList(stages)
        self.head = _head(widths[-1], 3)

    def forward(self, x: Tensor, state: CausalState) -> Tensor:
        x = self.conv1(x, state)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, state)
        return _apply_head(self.head, x, state)


DecodeMore = Callable[[Tensor], Iterator[Tensor]]
"""Decodes the next latents (B, 16, T, h, w) of a clip; yields pixels as `WanVAE.decode_stream` does.

Read the pixels to the end before the next call.
"""


class VideoDecoder(Protocol):
    """Decodes latents to pixels; `WanVAE` documents the shapes."""

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]: ...

    def begin_clip(self) -> DecodeMore: ...


class VideoVAE(VideoDecoder, Protocol):
    """What the pipeline needs of a video VAE."""

    def encode(self, video: Tensor) -> Tensor: ...


class WanVAE(nn.Module):
    """Encoder, decoder and the two 1x1x1 layers between them."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VAEConfig()
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

    @property
    def spatial_factor(self) -> int:
        """Pixels that a latent pixel covers along one axis: 8."""
        return int(2 ** len(self.config.temporal_downsample))

    def encode(self, video: Tensor, frames_at_once: int = 4) -> Tensor:
        """Normalised posterior mean (B, 16, T, h, w) float32 of pixels (B, 3, 4T-3, H, W) in [-1, 1].

        frames_at_once: frames in a pass after the first one, a multiple of 4.
        """
        if video.shape[2] % 4 != 1 or frames_at_once % 4:
            raise ValueError(
                f"a clip must have 1+4n frames and passes 4n, not {video.shape[2]} and {frames_at_once}"
            )
        video = video.to(self.conv1.weight.dtype)
        state: CausalState = {}
        pieces = [self.encoder(video[:, :, :1], state)]
        for piece in video[:, :, 1:].split(frames_at_once, dim=2):
            if piece.shape[2]:
                pieces.append(self.encoder(piece, state))
        mean = self.conv1(torch.cat(pieces, dim=2)).float().chunk(2, dim=1)[0]
        return normalise(mean)

    def decode_stream(self, latent: Tensor, latents_at_once: int = 1) -> Iterator[Tensor]:
        """Yield pixels (B, 3, n, H, W) float32, about [-1, 1], in order; n = 1 first, then 4 a latent."""
        return self.begin_clip(latents_at_once)(latent)

    def begin_clip(self, latents_at_once: int = 1) -> DecodeMore:
        """A function that decodes a clip whose latents come little by little.

        Its state is the causal history, so memory does not grow. With one latent in a pass the pixels are
        those of the whole clip bit for bit.
        """
        state: CausalState = {}

        def decode(latent: Tensor) -> Iterator[Tensor]:
            z = self.conv2(denormalise(latent).to(self.conv2.weight.dtype))
            for piece in z.split(latents_at_once, dim=2):
                yield self.decoder(piece, state).float()

        return decode

    def decode(self, latent: Tensor, latents_at_once: int = 1) -> Tensor:
        """Pixels (B, 3, 4T-3, H, W) float32 of normalised latents (B, 16, T, h, w), not clamped."""
        return torch.cat(list(self.decode_stream(latent, latents_at_once)), dim=2)


def normalise(mean: Tensor) -> Tensor:
    """Latents as the DiT uses them, from the encoder's mean (B, 16, T, h, w) float32."""
    offset, scale = _statistics(mean)
    return (mean - offset) / scale


def denormalise(latent: Tensor) -> Tensor:
    """The decoder's input, float32, from normalised latents (B, 16, T, h, w)."""
    offset, scale = _statistics(latent)
    return latent.float() * scale + offset


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = upload(torch.tensor(LATENT_MEAN).view(shape), like.device)
    return mean, upload(torch.tensor(LATENT_STD).view(shape), like.device)


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)])


def _head(width: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelRMSNorm(width, 3), nn.SiLU(), CausalConv3d(width, out_channels, (3, 3, 3)))


def _apply_head(head: nn.Sequential, x: Tensor, state: CausalState) -> Tensor:
    norm, activation, conv = head
    out: Tensor = conv(activation(norm(x)), state)
    return out
