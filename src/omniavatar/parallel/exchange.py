"""Exchanges between ranks inside a window: interfaces, and implementations with collectives (NCCL, gloo).

In attention, ranks that share the heads turn "my tokens, all heads" into "all tokens, my heads" and back.
Ranks that share the query tokens of the same heads exchange keys and values. In the VAE, neighbours exchange
the picture rows at their border. `parallel.direct` implements the same with copies between GPUs; both are
bit-identical.

Shapes: B batch, L tokens of the ranks that exchange, l tokens of this rank, H heads, h heads of a rank in one
piece, D head dim.
Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from omniavatar.parallel.peers import Peers

T = TypeVar("T")
S = TypeVar("S")
T_co = TypeVar("T_co", covariant=True)


class Arriving(Protocol[T_co]):
    """A pending result. On CUDA, `wait` makes the current stream wait, not the host."""

    def wait(self) -> T_co: ...


class HeadExchange(Protocol):
    """The exchange of heads, as one rank sees it.

    All ranks call the same methods in the same order. They wait for all results before they send tensors
    computed from them, as attention does.

    index: index of this rank among the `size` ranks.
    counts: tokens of each rank.
    """

    index: int
    size: int

    def to_heads(self, x_BlHD: Tensor, span: slice, counts: list[int]) -> Arriving[Tensor]:
        """All tokens (L, B, h, D) of the heads in `span`, counted within this rank's share of the heads."""

    def to_tokens(self, out_LBhD: Tensor, counts: list[int]) -> Arriving[list[Tensor]]:
        """This rank's tokens (l, B, h, D) for the heads of each rank, in order."""


class RowExchange(Protocol):
    """A gather of rows, as one rank sees it.

    index: index of this rank among the `size` ranks.
    counts: rows of each rank.
    """

    index: int
    size: int

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        """The rows of all ranks, in order, on every one of them."""


class BorderExchange(Protocol):
    """The swap of border rows, as one rank sees it; all ranks call it together."""

    def swap(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> None:
        """Send rows to the previous and the next rank, and fill the rows that come from them.

        The work is queued on the current stream. All rows have the same shape and any strides. If `leaving`
        and `arriving` are empty on one rank, they must be empty on all.
        """


class Arrived(Generic[T]):
    """A result that is available at once."""

    def __init__(self, value: T) -> None:
        self._value = value

    def wait(self) -> T:
        return self._value


class Converted(Generic[S, T]):
    """A pending result that is converted when it arrives."""

    def __init__(self, pending: Arriving[S], convert: Callable[[S], T]) -> None:
        self._pending, self._convert = pending, convert

    def wait(self) -> T:
        return self._convert(self._pending.wait())


class CollectiveHeads:
    """A `HeadExchange` with all-to-alls of the backend; on CUDA they run on NCCL's stream."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self.index, self.size = peers, peers.index, peers.size

    def to_heads(self, x_BlHD: Tensor, span: slice, counts: list[int]) -> Arriving[Tensor]:
        parts = x_BlHD.unflatten(2, (self.size, -1))[:, :, :, span]
        if self.size == 1:
            return Arrived(parts[:, :, 0].transpose(0, 1))
        rows = parts.permute(2, 1, 0, 3, 4).flatten(0, 1)
        return self._peers.all_to_all(rows, [counts[self.index]] * self.size, counts)

    def to_tokens(self, out_LBhD: Tensor, counts: list[int]) -> Arriving[list[Tensor]]:
        if self.size == 1:
            return Arrived([out_LBhD])
        own = counts[self.index]
        pending = self._peers.all_to_all(out_LBhD, counts, [own] * self.size)
        return Converted(pending, lambda rows: list(rows.split(own)))


class CollectiveRows:
    """A `RowExchange` with an all-gather of the backend."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self.index, self.size = peers, peers.index, peers.size

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        return Arrived(rows if self.size == 1 else self._peers.gather(rows, counts))


class CollectiveBorder:
    """A `BorderExchange` with an all-to-all of the backend among `peers`."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def swap(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> None:
        ranks = range(self._peers.size)
        like = next(iter([*leaving.values(), *arriving.values()]), None)
        if like is None:
            return
        rows = torch.stack(list(leaving.values())) if leaving else like.new_empty((0, *like.shape))
        send, receive = ([int(rank in swap) for rank in ranks] for swap in (leaving, arriving))
        for target, row in zip(arriving.values(), self._peers.exchange(rows, send, receive), strict=True):
            target.copy_(row)
