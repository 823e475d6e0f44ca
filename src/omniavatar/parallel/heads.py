"""Attention's exchanges: among the ranks that share its heads, "my tokens, all heads" to "all tokens, my
heads" and back; among those that share the query tokens of the same heads, keys and values. Two ways, equal
to the bit.

`CollectiveHeads` and `CollectiveRows` leave it to the backend (NCCL, gloo) and work anywhere. NCCL's kernels
take multiprocessors from the product they are to travel beside: on two H100 only 2 to 7 % of their time is
hidden. `DirectHeads` and `DirectRows` write into the other GPUs' memory by their copy engines, which take
none: a copy of 78 MB beside a product of 1.0 ms makes it 0.02 ms longer, NCCL 0.29. They need GPUs of one
machine that reach each other.

Shapes: B batch, L tokens of the ranks that exchange, l of this one, H heads, h of a rank in one piece, D head
dim.
Source: DeepSpeed-Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from omniavatar.parallel.layout import starts
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


class Arrived(Generic[T]):
    """What is here already."""

    def __init__(self, value: T) -> None:
        self._value = value

    def wait(self) -> T:
        return self._value


class _Converted(Generic[S, T]):
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
        return _Converted(pending, lambda rows: list(rows.split(own)))


class CollectiveRows:
    """By an all-gather of the backend."""

    def __init__(self, peers: Peers) -> None:
        self._peers, self.index, self.size = peers, peers.index, peers.size

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        return Arrived(rows if self.size == 1 else self._peers.gather(rows, counts))


class Slot(Protocol):
    """A piece of memory on every rank, into which the others write."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The beginning of the piece that lies on `rank`."""

    def meet(self) -> None:
        """Queue a wait until all ranks have come here; what they wrote before is there then."""


class Mailbox(Protocol):
    """Slots by number. `streams`: where copies are queued, and where what they copy is made and used."""

    def slot(self, number: int, size: int) -> Slot:
        """Slot `number` with at least `size` bytes; all ranks ask for the same."""

    def aside(self) -> Any:
        """A context in which work is queued beside the current stream, after what is queued there now."""

    def mark(self) -> Callable[[], None]:
        """What makes the then current stream wait for what is queued now."""


class _Direct:
    """One rank that writes into slots of the others' memory, `slots` of them in turn."""

    def __init__(self, mailbox: Mailbox, index: int, size: int, slots: int) -> None:
        self._mailbox, self.index, self.size = mailbox, index, size
        self._slots, self._next = slots, 0

    def _others(self) -> list[int]:
        """The other ranks, from the next one on, so that not all write to the same one first."""
        return [(self.index + step) % self.size for step in range(1, self.size)]

    def _take(self, shape: Sequence[int], dtype: torch.dtype) -> Slot:
        slot = self._mailbox.slot(self._next, math.prod(shape) * dtype.itemsize)
        self._next = (self._next + 1) % self._slots
        return slot

    def _send(self, slot: Slot, leaving: dict[int, Tensor], places: dict[int, Tensor]) -> _Sent:
        with self._mailbox.aside():
            for rank, rows in leaving.items():
                places[rank].copy_(rows, non_blocking=True)
            slot.meet()
            return _Sent(self._mailbox.mark(), [*leaving.values()])


class DirectRows(_Direct):
    """By copies into slots of the other ranks' memory: of keys and values, for two blocks in turn.

    Who sends the keys of a block has had the others' values of the block before, and they sent those after
    they had read the slots of the one before that.
    """

    def __init__(self, mailbox: Mailbox, index: int, size: int) -> None:
        super().__init__(mailbox, index, size, slots=4)

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        shape, dtype = (sum(counts), *rows.shape[1:]), rows.dtype
        slot, rows = self._take(shape, dtype), rows.contiguous()
        first = starts(counts)[self.index]
        mine = slice(first, first + counts[self.index])
        here = slot.view(self.index, shape, dtype)
        here[mine].copy_(rows)
        places = {rank: slot.view(rank, shape, dtype)[mine] for rank in self._others()}
        return _Converted(self._send(slot, dict.fromkeys(places, rows), places), lambda _: here)


class DirectHeads(_Direct):
    """By copies into slots of the other ranks' memory.

    Slots are taken in turn, as many as a block's attention has exchanges, so each has one use. Nobody needs
    to say that a slot may be written again: who sends v of the next block has had the others' results of
    this one, and they sent them after they had read v, and so on around.
    """

    def __init__(self, mailbox: Mailbox, index: int, size: int, pieces: int = 1) -> None:
        super().__init__(mailbox, index, size, slots=4 * pieces)

    def to_heads(self, x_BlHD: Tensor, span: slice, counts: list[int]) -> Arriving[Tensor]:
        parts = x_BlHD.unflatten(2, (self.size, -1))[:, :, :, span].transpose(0, 1)
        first = starts(counts)[self.index]
        shape = (sum(counts), *parts.shape[1:2], *parts.shape[3:])
        slot = self._take(shape, x_BlHD.dtype)
        leaving = {rank: parts[:, :, rank].contiguous() for rank in self._others()}
        here = slot.view(self.index, shape, x_BlHD.dtype)
        here[first : first + counts[self.index]].copy_(parts[:, :, self.index])
        places = {
            rank: slot.view(rank, shape, x_BlHD.dtype)[first : first + counts[self.index]] for rank in leaving
        }
        return _Converted(self._send(slot, leaving, places), lambda _: here)

    def to_tokens(self, out_LBhD: Tensor, counts: list[int]) -> Arriving[list[Tensor]]:
        parts = out_LBhD.split(counts)
        rest, dtype = out_LBhD.shape[1:], out_LBhD.dtype
        slot = self._take((self.size * max(counts), *rest), dtype)
        leaving = {rank: parts[rank].contiguous() for rank in self._others()}
        places = {
            rank: slot.view(rank, (self.size, counts[rank], *rest), dtype)[self.index] for rank in leaving
        }
        arrived = slot.view(self.index, (self.size, counts[self.index], *rest), dtype)

        def by_rank(_: None) -> list[Tensor]:
            return [parts[rank] if rank == self.index else arrived[rank] for rank in range(self.size)]

        return _Converted(self._send(slot, leaving, places), by_rank)


class _Sent:
    """Holds what leaves until the current stream has waited for it."""

    def __init__(self, arrive: Callable[[], None], held: list[Tensor]) -> None:
        self._arrive, self._held = arrive, held

    def wait(self) -> None:
        self._arrive()
        self._held.clear()
