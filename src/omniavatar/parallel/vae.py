"""Runs the fast VAE on all ranks of a video; each rank codes a run of the picture's rows.

Every rank has the latents already (or the pixels, for the hand-over). It computes its own rows of every layer
and swaps one row with each neighbour before a 3x3 convolution. It gathers the keys and values of the
attention, and the result (`accel.vae_frames`, `parallel.picture_rows`). All ranks call the methods with the
same values and get the whole result. The memory for past frames and activations is divided by the number of
ranks.
Cost in quality: only the rounding of convolutions with other heights.
Limits: if a picture has fewer latent rows than ranks, every rank computes the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omniavatar.accel.decoder import OtherDecoder
from omniavatar.accel.vae import FastVAE, SplitRows
from omniavatar.model.vae import DecodeMore, VideoDecoder, VideoVAE


def apply_shared_vae(vae: VideoVAE, split: SplitRows) -> VideoVAE:
    """`vae` shared by the ranks of `split`; it must be a fast VAE, or have a fast decoder beside one."""
    if isinstance(vae, OtherDecoder):
        return OtherDecoder(_shared(vae.vae, split), _shared(vae.decoder, split))
    return _shared(vae, split)


def _shared(vae: VideoDecoder, split: SplitRows) -> SharedVAE:
    if not isinstance(vae, FastVAE):
        raise TypeError(f"only the fast VAE shares its rows, not {type(vae).__name__}")
    return SharedVAE(vae, split)


class SharedVAE:
    """A `FastVAE` whose work is shared by several ranks."""

    def __init__(self, vae: FastVAE, split: SplitRows) -> None:
        self._vae, self._split = vae, split

    def encode(self, video: Tensor) -> Tensor:
        """See `FastVAE.encode`."""
        return self._vae.encode(video, self._split)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """See `FastVAE.decode_stream`."""
        return self._vae.decode_stream(latent, self._split)

    def begin_clip(self) -> DecodeMore:
        """See `FastVAE.begin_clip`."""
        return self._vae.begin_clip(self._split)
