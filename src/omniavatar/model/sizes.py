"""Sizes of the networks, as plain values that need no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer. audio_dim: width of a video frame's audio vector (0: no audio layers)."""

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
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def audio_blocks(self) -> range:
        """Indices of the blocks that receive audio."""
        return audio_block_indices(self.num_layers) if self.audio_dim else range(0)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the released one has `dim` 96."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


FRAMES_PER_LATENT = 4


def audio_block_indices(num_layers: int) -> range:
    """Indices of the blocks that receive audio: 2 to num_layers//2, both included."""
    return range(2, num_layers // 2 + 1)
