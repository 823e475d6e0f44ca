"""Sizes of the networks, as plain values that need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer.

    - audio_dim: width of a video frame's audio vector (0: no audio layers).
    - audio_hidden: width between the audio layers.
    - audio_tokens: tokens a latent frame that cross-attention sees in place of a text (`model.audio_tokens`);
      0: it sees a text, and audio is added before blocks.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 33
    out_dim: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    audio_dim: int = 10752
    audio_hidden: int = 32
    audio_tokens: int = 0
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def audio_blocks(self) -> range:
        """Indices of the blocks that receive audio."""
        added = self.audio_dim and not self.audio_tokens
        return audio_block_indices(self.num_layers) if added else range(0)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the released one has `dim` 96."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


FRAMES_PER_LATENT = 4
WINDOW_ROWS, LATENT_ROWS = 5, 8
"""Feature rows that a frame hears, and that a latent after the first takes (`model.audio_tokens`)."""


def audio_block_indices(num_layers: int) -> range:
    """Indices of the blocks that receive audio: 2 to num_layers//2, both included."""
    return range(2, num_layers // 2 + 1)


def frames_of_pass(latents: int) -> int:
    """Frames that are encoded at once if `latents` latents are decoded at once."""
    return 8 * latents - 4
