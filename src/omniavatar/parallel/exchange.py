"""What ranks exchange while they make a window: interfaces, and a backend's collectives (NCCL, gloo).

Attention: among the ranks that share its heads, "my tokens, all heads" to "all tokens, my heads" and back;
among those that share the query tokens of the same heads, keys and values. The VAE: the rows of a picture at
the border between two ranks. `parallel.direct` does the same by copies between GPUs; both give the same bits.

Shapes: B batch, L tokens of the ranks that exchange, l of this one, H heads, h of a rank in one piece, D head
dim.
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
    """Something under way; on CUDA `wait` makes the current stream wait, not the host."""

    def wait(self) -> T_co: ...


class HeadExchange(Protocol):
    """One rank's side of the exchange. index: its place among `size`. counts: tokens of each of them.

    All ranks call the same methods in the same order, and wait for everything of one kind before they send
    what was computed from it, as attention does.
    """

    index: int
    size: int

    def to_heads(self, x_BlHD: Tensor, span: slice, counts: list[int]) -> Arriving[Tensor]:
        """All tokens (L, B, h, D) of the heads `span` of this rank's share."""

    def to_tokens(self, out_LBhD: Tensor, counts: list[int]) -> Arriving[list[Tensor]]:
        """This rank's tokens (l, B, h, D) of each rank's heads, in order."""


class RowExchange(Protocol):
    """One rank's side of the gather. index: its place among `size`. counts: rows of each of them."""

    index: int
    size: int

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        """The rows of all ranks, in order, on every one of them."""


class BorderExchange(Protocol):
    """One rank's side of the swap of border rows; all ranks call together."""

    def swap(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> None:
        """Send rows to the rank before and the one after, and fill those that come from them.

        All rows have one shape and any strides. Where nothing leaves and nothing arrives, it is so on every
        rank. Queued on the current stream.
        """


class Arrived(Generic[T]):
    """What is here already."""

    def __init__(self, value: T) -> None:
        self._value = value

    def wait(self) -> T:
        return self._value


class Converted(Generic[S, T]):
    """What is under way, in another form once it is here."""

    def __init__(self, pending: Arriving[S], convert: Callable[[S], T]) -> None:
        self._pending, self._convert = pending, convert

    def wait(self) -> T:
        return self._convert(self._pending.wait())


class CollectiveHeads:
    """By all-to-alls of the backend; on CUDA they run on a stream of NCCL's own."""

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
    """By an all-gather of the backend."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self.index, self.size = peers, peers.index, peers.size

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        return Arrived(rows if self.size == 1 else self._peers.gather(rows, counts))


class CollectiveBorder:
    """By an all-to-all of the backend among `peers`."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    def swap(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> None:
        ranks = range(self._peers.size)
        like = next(iter([*leaving.values(), *arriving.values()]), None)
        if like is None:
            return
        rows = torch.stack(list(leaving.values())) if leaving else like.new_empty((0, *like.shape))
        send, receive = ([int(rank in swap) for rank in ranks] for swap in (leaving, arriving))
        for place, row in zip(arriving.values(), self._peers.exchange(rows, send, receive), strict=True):
            place.copy_(row)
