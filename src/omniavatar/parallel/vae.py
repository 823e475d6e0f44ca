"""The fast VAE on all ranks that make a video: each codes a run of the picture's rows.

What changes: every rank has the latents already (or the pixels, for the hand-over), computes its own rows of
every layer, swaps one row with its neighbours before each 3x3 convolution, and gathers keys and values of the
one attention and the result (`accel.vae_frames`, `parallel.picture_rows`). All ranks call, with the same
values, and all get the whole result. Past frames and activations are divided by the ranks.
What it loses: nothing but the rounding of convolutions of other heights.
Limits: a picture with fewer latent rows than ranks is computed whole by each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from omniavatar.accel.decoder import OtherDecoder
from omniavatar.accel.vae import FastVAE, SplitRows
from omniavatar.model.vae import VideoDecoder, VideoVAE


def apply_shared_vae(vae: VideoVAE, split: SplitRows) -> VideoVAE:
    """`vae`, a fast one or with a fast decoder in its place, on the ranks that `split` deals rows to."""
    if isinstance(vae, OtherDecoder):
        return OtherDecoder(_shared(vae.vae, split), _shared(vae.decoder, split))
    return _shared(vae, split)


def _shared(vae: VideoDecoder, split: SplitRows) -> SharedVAE:
    if not isinstance(vae, FastVAE):
        raise TypeError(f"only the fast VAE shares its rows, not {type(vae).__name__}")
    return SharedVAE(vae, split)


class SharedVAE:
    """Stands in for the `FastVAE` of each rank; its weights and passes are that one's."""

    def __init__(self, vae: FastVAE, split: SplitRows) -> None:
        self._vae, self._split = vae, split

    def encode(self, video: Tensor) -> Tensor:
        """See `FastVAE.encode`."""
        return self._vae.encode(video, self._split)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """See `FastVAE.decode_stream`."""
        return self._vae.decode_stream(latent, self._split)
