"""Distributes the rows of a picture over the ranks of a video, for the VAE.

Each rank has a run of latent rows and, in every stage, the pixel rows that belong to them. The lengths of the
runs differ by at most one latent row. A 3x3 convolution needs one row beyond the run, so neighbours swap
their border rows; beyond the picture the rows are zero, as in the padding of a convolution. Data that depends
on the whole picture (keys and values of the attention, the final pixels) is gathered. All exchanges are
bit-identical.

On CUDA nothing here makes the host wait.
Shapes: T frames, h rows of this rank, H rows of the picture and W pixels per row in some stage, C channels.
"""

from __future__ import annotations

from torch import Tensor

from omniavatar.parallel.exchange import BorderExchange, CollectiveBorder
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.rank_layout import deal, starts


class PictureRows:
    """The run of one rank in a picture of `rows` latent rows; every rank must get at least one row.

    border: exchange of the border rows; None for collectives of the backend.
    """

    def __init__(self, peers: Peers, rows: int, border: BorderExchange | None = None) -> None:
        if rows < peers.size:
            raise ValueError(f"{rows} rows are too few for {peers.size} ranks")
        self._peers = peers
        self._counts = deal(rows, peers.size)
        self._border = border or CollectiveBorder(peers)

    @property
    def ranks(self) -> int:
        """Number of ranks that share the picture."""
        return self._peers.size

    def mine(self, frames: Tensor) -> Tensor:
        """The rows (T, h, W, C) of this rank in whole frames (T, H, W, C); H must be a multiple of the latent
        rows."""
        factor, rest = divmod(frames.shape[1], sum(self._counts))
        if rest:
            raise ValueError(
                f"{frames.shape[1]} pixel rows are not a multiple of {sum(self._counts)} latent rows"
            )
        first, count = starts(self._counts)[self._peers.index], self._counts[self._peers.index]
        return frames[:, first * factor : (first + count) * factor]

    def border(self, window: Tensor, above: bool = True, below: bool = True) -> None:
        """Fill the first and last row of `window` (T, h + 2, W, C) with the rows of the neighbours.

        above, below: whether `window` has that extra row; equal on all ranks.
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
        """Whole frames (T, H, W, C) on every rank, from the rows (T, h, W, C) of each rank."""
        factor = frames.shape[1] // self._counts[self._peers.index]
        counts = [count * factor for count in self._counts]
        return self._peers.gather(frames.transpose(0, 1), counts).transpose(0, 1)
