"""Exchanges by copies into other GPUs' memory, whose copy engines do them: they take no multiprocessor.

NCCL's kernels take multiprocessors from the product they are to travel beside: on two H100 only 2 to 7 % of
their time is hidden, and a copy of 78 MB beside a product of 1.0 ms makes it 0.29 ms longer, by the copy
engines 0.02. The GPUs must be of one machine and reach each other (`parallel.mailbox`).

Each exchange writes into slots of its own that are taken in turn. Nobody says that a slot may be written
again: the exchanges between imply it, as each class tells.
Shapes: see `parallel.exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from omniavatar.parallel.exchange import Arriving, Converted
from omniavatar.parallel.rank_layout import starts


class Slot(Protocol):
    """A piece of memory on every rank, into which the others write."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The beginning of the piece that lies on `rank`."""

    def meet(self) -> None:
        """Queue a wait until all ranks have come here; what they wrote before is there then."""


class Mailbox(Protocol):
    """Slots by number, and the order of what is copied into them and of what makes and uses that."""

    def slot(self, number: int, size: int) -> Slot:
        """Slot `number` with at least `size` bytes; all ranks ask for the same."""

    def aside(self) -> AbstractContextManager[None]:
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
    """See `exchange.RowExchange`: keys and values, for two blocks in turn.

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
        return Converted(self._send(slot, dict.fromkeys(places, rows), places), lambda _: here)


class DirectHeads(_Direct):
    """See `exchange.HeadExchange`. As many slots as a block's attention has exchanges, so each has one use.

    Who sends v of the next block has had the others' results of this one, and they sent them after they had
    read v, and so on around.
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
        return Converted(self._send(slot, leaving, places), lambda _: here)

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

        return Converted(self._send(slot, leaving, places), by_rank)


class _Sent:
    """Holds what leaves until the current stream has waited for it."""

    def __init__(self, arrive: Callable[[], None], held: list[Tensor]) -> None:
        self._arrive, self._held = arrive, held

    def wait(self) -> None:
        self._arrive()
        self._held.clear()


class DirectBorder(_Direct):
    """See `exchange.BorderExchange`; two slots, each for the row from above and the one from below.

    All ranks meet in every swap: who writes into a slot again has met the others in the swap between, and
    they came there after they had read it.
    """

    def __init__(self, mailbox: Mailbox, index: int, size: int) -> None:
        super().__init__(mailbox, index, size, slots=2)

    def swap(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> None:
        like = next(iter([*leaving.values(), *arriving.values()]), None)
        if like is None:
            return
        shape = (2, *like.shape)
        slot = self._take(shape, like.dtype)
        for rank, row in leaving.items():
            slot.view(rank, shape, like.dtype)[int(self.index > rank)].copy_(row)
        slot.meet()
        arrived = slot.view(self.index, shape, like.dtype)
        for rank, place in arriving.items():
            place.copy_(arrived[int(rank > self.index)])
