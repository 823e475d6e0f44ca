"""The video VAE at the speed of its convolutions: the plain module's weights on channels-last frames.

What changes:
- frames are channels-last;
- bias, residual sum, norm and SiLU are one kernel that writes into the next convolution's input
  (`vae_frames`, `kernels.channel_norm`);
- nearest doubling and the convolution after it are one 2x2 convolution with four output phases;
- narrow convolutions take two columns at once;
- 1x1 convolutions and the attention of a frame are matrix products;
- a pass takes several latents.
What it loses: rounding only. Sums are rounded less often than in the plain modules; `merged_upsample` rounds
the added weights once more in bf16.
Limits: the clips of a batch run one after the other. Memory grows with `latents_at_once`: about 1.2 GiB of
past frames and 0.7 GiB a latent at 400x720 in bf16 for the released sizes. CUDA graphs would gain nothing: a
pass takes tens of milliseconds on the GPU and about three to launch.
Source: the plain modules in `model.vae` (Wan 2.1, arXiv 2503.20314).

Shapes: B clips, N = 4T-3 frames, T latents, H W pixels, h w = H/8 W/8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from omniavatar.accel.kernels import channel_norm, float8_conv
from omniavatar.accel.kernels.channel_norm import AddNorm
from omniavatar.accel.kernels.float8_conv import Convolve
from omniavatar.accel.vae_frames import Clip, FrameLayers, SharedRows, pointwise
from omniavatar.model.sizes import frames_of_pass
from omniavatar.model.vae import DecodeMore, Decoder, Encoder, WanVAE, denormalise, normalise

Kernels = Literal["eager", "triton"]
SplitRows = Callable[[int], SharedRows | None]
"""From a picture's number of latent rows to this rank's rows, None for all of them (`parallel.vae`)."""


def whole_picture(rows: int) -> None:
    """The `SplitRows` of a process that computes whole pictures."""


@dataclass(frozen=True)
class FastVAEConfig:
    """How the fast VAE runs."""

    kernels: Kernels = "triton"
    """triton (CUDA only), or eager: the same in plain PyTorch."""
    merged_upsample: bool = True
    """Doubling and the convolution after it as one 2x2 convolution of four phases."""
    matmul_attention: bool = True
    """Attention of a frame as two matrix products, else PyTorch's scaled_dot_product_attention."""
    paired_columns: bool = True
    """Convolutions of up to 96 channels run over pairs of neighbouring columns; faster on CUDA only."""
    search_convolutions: bool = False
    """cuDNN chooses kernels by timing them, once for each shape in a process. Two processes may choose
    differently and round differently: a resumed video would not be the same byte for byte."""
    float8: bool = False
    """Convolutions of residual blocks in float8, which is lossy (`vae_float8`); triton needs a Hopper GPU."""
    padded_float8: bool = True
    """Float8 windows of channels that are no multiple of 64 have a column of zeros on either side."""
    latents_at_once: int = 2
    """Latents in a decoding pass after the first one."""
    frames_at_once: int = 12
    """Frames in an encoding pass after the first one, a multiple of 4."""


def coding_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of the VAE of a model in `dtype`: float32 on a CPU, else `dtype`.

    CPUs emulate convolutions in bfloat16, which takes 15 to 40 times as long.
    """
    return torch.float32 if device.type == "cpu" else dtype


def apply_fast_vae(vae: WanVAE, config: FastVAEConfig) -> FastVAE:
    """The fast VAE around `vae`, whose convolution weights become channels-last in place (same values)."""
    return FastVAE(vae, config)


class FastVAE:
    """Replaces a `WanVAE`: same methods, same shapes, same numbers within rounding."""

    def __init__(self, vae: WanVAE, config: FastVAEConfig) -> None:
        if config.frames_at_once % 4 or config.frames_at_once < 4 or config.latents_at_once < 1:
            raise ValueError("frames_at_once must be a multiple of 4 and latents_at_once at least 1")
        self.plain = vae
        self.config = config
        self._layers = _frame_layers(config)
        self._layers.prepare(vae)

    def use_pass(self, latents: int) -> None:
        """From the next clip on, decode `latents` and encode `frames_of_pass(latents)` frames at once."""
        frames = frames_of_pass(latents)
        self.config = replace(self.config, latents_at_once=latents, frames_at_once=frames)

    @property
    def spatial_factor(self) -> int:
        """Pixels that a latent pixel covers along one axis: 8."""
        return self.plain.spatial_factor

    @torch.no_grad()
    def encode(self, video: Tensor, split: SplitRows = whole_picture) -> Tensor:
        """Normalised posterior mean (B, 16, T, h, w) float32 of pixels (B, 3, 4T-3, H, W) in [-1, 1].

        split: the rows that this rank computes. Ranks that share a picture all pass and return the whole one.
        """
        if video.shape[2] % 4 != 1:
            raise ValueError(f"a clip must have 1+4n frames, not {video.shape[2]}")
        means: list[Tensor] = []
        for frames in video.to(self.plain.conv1.weight.dtype).permute(0, 2, 3, 4, 1):
            clip = Clip(split(frames.shape[1] // self.spatial_factor))
            passes = _passes(clip.mine(frames), self.config.frames_at_once, first_alone=True)
            pieces = [self._encode_frames(piece, clip) for piece in passes]
            means.append(clip.whole(torch.cat(pieces).chunk(2, dim=-1)[0]))
        return normalise(torch.stack(means).permute(0, 4, 1, 2, 3).contiguous())

    def decode_stream(self, latent: Tensor, split: SplitRows = whole_picture) -> Iterator[Tensor]:
        """Yield pixels (B, 3, n, H, W) float32, about [-1, 1], in order; n = 1 first, then 4 for each latent.

        split: see `encode`. N ranks that share a picture take N times as many latents in a pass, so that a
        pass is as large as in one process.
        """
        return self.begin_clip(split)(latent)

    def begin_clip(self, split: SplitRows = whole_picture) -> DecodeMore:
        """See `model.vae.WanVAE.begin_clip`."""
        clips: list[Clip] = []

        @torch.no_grad()
        def decode(latent: Tensor) -> Iterator[Tensor]:
            z = denormalise(latent).to(self.plain.conv2.weight.dtype).permute(0, 2, 3, 4, 1)
            if not clips:
                clips.extend(Clip(split(z.shape[2])) for _ in z)
            streams = [
                _passes(clip.mine(frames), clip.ranks * self.config.latents_at_once, not clip.started)
                for frames, clip in zip(z, clips, strict=True)
            ]
            for pieces in zip(*streams, strict=True):
                yield self._decode_clips(pieces, clips)

        return decode

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, 4T-3, H, W) float32 of normalised latents (B, 16, T, h, w), not clamped."""
        return torch.cat(list(self.decode_stream(latent)), dim=2)

    def _decode_clips(self, pieces: Sequence[Tensor], clips: Sequence[Clip]) -> Tensor:
        """Pixels (B, 3, n, H, W) float32 of the next latents (n, rows, w, 16) of each clip."""
        pixels = [
            clip.whole(self._decode_latents(piece, clip)) for piece, clip in zip(pieces, clips, strict=True)
        ]
        return torch.stack(pixels).permute(0, 4, 1, 2, 3)

    def _encode_frames(self, frames: Tensor, clip: Clip) -> Tensor:
        """Mean and log variance (T, h, w, 32) float32 of frames (n, H, W, 3)."""
        encoder = self.plain.encoder
        value = self._network(encoder, (*encoder.downsamples, *encoder.middle), frames, clip)
        return pointwise(self.plain.conv1, value.to(frames.dtype)).float()

    def _decode_latents(self, latents: Tensor, clip: Clip) -> Tensor:
        """Pixels (n, H, W, 3) float32 of latents (T, h, w, 16)."""
        decoder = self.plain.decoder
        z = pointwise(self.plain.conv2, latents)
        return self._network(decoder, (*decoder.middle, *decoder.upsamples), z, clip)

    def _network(
        self, network: Encoder | Decoder, layers: Sequence[torch.nn.Module], x: Tensor, clip: Clip
    ) -> Tensor:
        run = self._layers
        with _convolution_search(self.config.search_convolutions):
            pending = run.stem(network.conv1, x, clip)
            for layer in layers:
                pending = run.run(layer, pending, clip)
            out = run.head(network.head, pending, clip)
        clip.started = True
        return out


def _passes(frames: Tensor, at_once: int, first_alone: bool) -> list[Tensor]:
    """`at_once` frames in each pass, except that a clip's first frame is coded alone."""
    alone = [frames[:1]] if first_alone else []
    rest = frames[len(alone) :]
    return [*alone, *(rest.split(at_once) if len(rest) else ())]


def _frame_layers(config: FastVAEConfig) -> FrameLayers:
    flags = config.merged_upsample, config.matmul_attention, config.paired_columns
    if not config.float8:
        return FrameLayers(_kernels(config), *flags)
    from omniavatar.accel.vae_float8 import Float8Layers

    return Float8Layers(_kernels(config), *flags, _convolve_float8(config), config.padded_float8)


def _convolve_float8(config: FastVAEConfig) -> Convolve:
    if config.kernels == "eager":
        return float8_conv.convolve
    from omniavatar.accel.kernels import float8_conv_cuda

    return float8_conv_cuda.convolve


def _kernels(config: FastVAEConfig) -> AddNorm:
    if config.kernels == "eager":
        return channel_norm.add_norm
    from omniavatar.accel.kernels import channel_norm_triton

    return channel_norm_triton.add_norm


@contextmanager
def _convolution_search(search: bool) -> Iterator[None]:
    """Switches cuDNN's timing of its kernels on or off for this pass only."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
