"""A picture's rows over the ranks of a video: what a rank's VAE needs of the others' rows, and nothing else.

Each rank holds a run of latent rows, and in every stage the rows of pixels that belong to them; runs differ
by one latent row at most. A 3x3 convolution looks one row beyond a run: neighbours swap their outermost rows,
and beyond the picture there are zeros, as in a convolution's own padding. All that looks at the whole picture
(keys and values of the attention, the pixels in the end) is gathered. What arrives is equal to the bit.

On CUDA nothing here makes the host wait.
Shapes: T frames, h W rows of this rank and pixels of a row in some stage, H rows of the picture there, C
channels.
"""

from __future__ import annotations

from torch import Tensor

from omniavatar.parallel.exchange import BorderExchange, CollectiveBorder
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.rank_layout import deal, starts


class PictureRows:
    """One rank's run of a picture of `rows` latent rows, at least one for each of `peers`.

    border: how its border rows travel; by the backend's collectives if None.
    """

    def __init__(self, peers: Peers, rows: int, border: BorderExchange | None = None) -> None:
        if rows < peers.size:
            raise ValueError(f"{rows} rows for {peers.size} ranks")
        self._peers = peers
        self._counts = deal(rows, peers.size)
        self._border = border or CollectiveBorder(peers)

    @property
    def ranks(self) -> int:
        """Ranks that share the picture."""
        return self._peers.size

    def mine(self, frames: Tensor) -> Tensor:
        """This rank's rows (T, h, W, C) of whole frames (T, H, W, C); H is a multiple of the latent rows."""
        factor, rest = divmod(frames.shape[1], sum(self._counts))
        if rest:
            raise ValueError(f"{frames.shape[1]} rows of pixels for {sum(self._counts)} of latents")
        first, count = starts(self._counts)[self._peers.index], self._counts[self._peers.index]
        return frames[:, first * factor : (first + count) * factor]

    def border(self, window: Tensor, above: bool = True, below: bool = True) -> None:
        """Fill the row above (first) and below (last) this rank's rows in `window` (T, h + 2, W, C).

        Only those asked for are there; all ranks ask for the same.
        """
        peers = self._peers
        before, after = peers.index > 0, peers.index < peers.size - 1
        own = window[:, int(above) : window.shape[1] - int(below)]
        leaving = {}
        if before and below:
            leaving[peers.index - 1] = own[:, 0]
        if after and above:
            leaving[peers.index + 1] = own[:, -1]
        arriving = {}
        if above:
            arriving[peers.index - 1] = window[:, 0]
        if below:
            arriving[peers.index + 1] = window[:, -1]
        beyond = arriving.keys() - range(peers.size)
        for rank in beyond:
            arriving.pop(rank).zero_()
        self._border.swap(leaving, arriving)

    def gather(self, frames: Tensor) -> Tensor:
        """Whole frames (T, H, W, C) on every rank, of each rank's rows (T, h, W, C)."""
        factor = frames.shape[1] // self._counts[self._peers.index]
        counts = [count * factor for count in self._counts]
        return self._peers.gather(frames.transpose(0, 1), counts).transpose(0, 1)
