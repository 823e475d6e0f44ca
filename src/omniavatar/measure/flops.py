"""Floating-point operations of the DiT and of the VAE, by formula from their sizes.

A multiplication and an addition count as two. Norms, activations, rotation and softmax do not count, as in
PyTorch's `flop_counter`, which the tests compare with: both agree exactly. The count is that of the maths: a
kernel that pads or recomputes does more, one that merges two layers (`accel.vae`: doubling and convolution)
does less.

Letters: L video tokens, C width, S text tokens, T latent frames, h w latent pixels, n frames at a stage.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omniavatar.model.sizes import LATENT_ROWS, WINDOW_ROWS

if TYPE_CHECKING:
    from omniavatar.model.sizes import DiTConfig, VAEConfig

TEXT_TOKENS = 512
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Work:
    """Operations by the kind of kernel that does them: matrix products (convolutions too), attention."""

    matrix: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        return self.matrix + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.matrix + other.matrix, self.attention + other.attention)

    def __mul__(self, times: int) -> Work:
        return Work(self.matrix * times, self.attention * times)


def video_tokens(config: DiTConfig, latent: Grid) -> int:
    """L of a latent clip (T, h, w)."""
    return math.prod(size // patch for size, patch in zip(latent, config.patch_size, strict=True))


def block_work(
    config: DiTConfig,
    tokens: int,
    text_tokens: int = TEXT_TOKENS,
    keys: int | None = None,
    kept: float = 1.0,
) -> Work:
    """One transformer block: q, k, v, o; text q, o; feed-forward; both attentions.

    keys: video tokens that each token attends to; None: those of the forward.
    kept: the share of self-attention that is computed.
    """
    products = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    own = tokens * (tokens if keys is None else keys)
    seen = (own if kept == 1 else round(own * kept)) + tokens * text_tokens
    return Work(2 * tokens * products, 4 * seen * config.dim)


def skipped_forward_work(config: DiTConfig, latent: Grid) -> Work:
    """A forward whose blocks are skipped: patch embedding, time embedding, head."""
    volume, tokens, dim = math.prod(config.patch_size), video_tokens(config, latent), config.dim
    patches = tokens * volume * (config.in_dim + config.out_dim) * dim
    time = config.freq_dim * dim + 7 * dim**2
    return Work(2 * (patches + time))


def forward_work(
    config: DiTConfig,
    latent: Grid,
    text_tokens: int | None = None,
    seen_frames: int | None = None,
    kept: float = 1.0,
) -> Work:
    """One whole forward of one branch on a latent clip (T, h, w).

    text_tokens: tokens that cross-attention sees; None: those of the model.

    seen_frames: latent frames that each token attends to; None: T.
    kept: the share of self-attention that is computed.
    """
    tokens = video_tokens(config, latent)
    if text_tokens is None:
        text_tokens = config.audio_tokens or TEXT_TOKENS
    keys = None if seen_frames is None else video_tokens(config, (seen_frames, *latent[1:]))
    blocks = block_work(config, tokens, text_tokens, keys, kept) * config.num_layers
    return skipped_forward_work(config, latent) + blocks


def text_work(config: DiTConfig, text_tokens: int = TEXT_TOKENS) -> Work:
    """`prepare_text` of one prompt: embedding, keys and values of every block."""
    dim = config.dim
    return Work(2 * text_tokens * (config.text_dim * dim + dim**2 + 2 * config.num_layers * dim**2))


def audio_work(config: DiTConfig, latent_frames: int) -> Work:
    """`prepare_audio` of one window."""
    if not config.audio_dim:
        return Work()
    if config.audio_tokens:
        hidden, out = config.audio_hidden, config.audio_tokens * config.dim
        rows = WINDOW_ROWS + (latent_frames - 1) * LATENT_ROWS
        projector = rows * config.audio_dim + latent_frames * (hidden + out)
        context = latent_frames * config.audio_tokens * 2 * config.num_layers * config.dim**2
        return Work(2 * (projector * hidden + context))
    pack = 4 * config.audio_dim * config.audio_hidden
    return Work(2 * latent_frames * (pack + len(config.audio_blocks) * config.audio_hidden * config.dim))


def decode_work(config: VAEConfig, latent: Grid) -> Work:
    """`WanVAE.decode` of T latents of h by w."""
    frames, height, width = latent
    widths = [config.dim * multiple for multiple in (config.dim_mult[-1], *reversed(config.dim_mult))]
    temporal = tuple(reversed(config.temporal_downsample))
    work = _conv(frames, height * width, config.z_dim, config.z_dim, 1)
    work += _conv(frames, height * width, config.z_dim, widths[0], 27)
    work += _middle(frames, height, width, widths[0])
    for level, (previous, channels) in enumerate(itertools.pairwise(widths)):
        entering = previous if level == 0 else previous // 2
        work += _stage(config.num_res_blocks + 1, frames, height * width, entering, channels)
        if level < len(temporal):
            if temporal[level]:
                work += _conv(frames - 1, height * width, channels, 2 * channels, 3)
                frames = 2 * frames - 1
            height, width = 2 * height, 2 * width
            work += _conv(frames, height * width, channels, channels // 2, 9)
    return work + _conv(frames, height * width, widths[-1], 3, 27)


def encode_work(config: VAEConfig, frames: int, size: tuple[int, int]) -> Work:
    """`WanVAE.encode` of 1+4n frames of (height, width) pixels."""
    height, width = size
    widths = [config.dim * multiple for multiple in (1, *config.dim_mult)]
    work = _conv(frames, height * width, 3, widths[0], 27)
    for level, (entering, channels) in enumerate(itertools.pairwise(widths)):
        work += _stage(config.num_res_blocks, frames, height * width, entering, channels)
        if level < len(config.temporal_downsample):
            height, width = height // 2, width // 2
            work += _conv(frames, height * width, channels, channels, 9)
            if config.temporal_downsample[level]:
                halved = (frames - 1) // 2
                work += _conv(halved, height * width, channels, channels, 3)
                frames = 1 + halved
    work += _middle(frames, height, width, widths[-1])
    latent_channels = 2 * config.z_dim
    work += _conv(frames, height * width, widths[-1], latent_channels, 27)
    return work + _conv(frames, height * width, latent_channels, latent_channels, 1)


def _conv(frames: int, pixels: int, channels_in: int, channels_out: int, taps: int) -> Work:
    return Work(2 * frames * pixels * channels_in * channels_out * taps)


def _residual(frames: int, pixels: int, entering: int, channels: int) -> Work:
    work = _conv(frames, pixels, entering, channels, 27) + _conv(frames, pixels, channels, channels, 27)
    return work if entering == channels else work + _conv(frames, pixels, entering, channels, 1)


def _stage(blocks: int, frames: int, pixels: int, entering: int, channels: int) -> Work:
    first = _residual(frames, pixels, entering, channels)
    return first + _residual(frames, pixels, channels, channels) * (blocks - 1)


def _middle(frames: int, height: int, width: int, channels: int) -> Work:
    pixels = height * width
    attention = Work(0, 4 * frames * pixels**2 * channels)
    projections = _conv(frames, pixels, channels, 4 * channels, 1)
    return _residual(frames, pixels, channels, channels) * 2 + projections + attention
