"""Exchanges by copies into the memory of other GPUs; the copy engines run them, without a multiprocessor.

NCCL's kernels take multiprocessors from the matrix product that runs at the same time. On two H100 only 2 to
7 % of their time is hidden: a copy of 78 MB makes a product of 1.0 ms 0.29 ms longer, but only 0.02 ms with
the copy engines. The GPUs must be in one machine and able to access each other (`parallel.mailbox`).

Each exchange has its own slots and uses them in turn. No message says that a slot is free again; the
exchanges in between guarantee it, as each class explains.
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
    """A memory buffer on every rank, into which the other ranks write."""

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor at the start of the buffer on `rank`."""

    def meet(self) -> None:
        """Queue a wait for all ranks; their earlier writes have arrived when it ends."""


class Mailbox(Protocol):
    """Slots by number, and the order between copies into them and other work on the GPU."""

    def slot(self, number: int, size: int) -> Slot:
        """Slot `number` with at least `size` bytes; all ranks must call it with the same arguments."""

    def aside(self) -> AbstractContextManager[None]:
        """A context that queues work on a side stream, after the work in the current stream."""

    def mark(self) -> Callable[[], None]:
        """A function that makes the current stream of its call wait for the work queued now."""


class _Direct:
    """One rank that writes into the other ranks' memory, using `slots` slots in turn."""

    def __init__(self, mailbox: Mailbox, index: int, size: int, slots: int) -> None:
        self._mailbox, self.index, self.size = mailbox, index, size
        self._slots, self._next = slots, 0

    def _others(self) -> list[int]:
        """The other ranks, beginning with the next one, so that not all ranks write to the same one first."""
        return [(self.index + step) % self.size for step in range(1, self.size)]

    def _take(self, shape: Sequence[int], dtype: torch.dtype) -> Slot:
        slot = self._mailbox.slot(self._next, math.prod(shape) * dtype.itemsize)
        self._next = (self._next + 1) % self._slots
        return slot

    def _send(self, slot: Slot, leaving: dict[int, Tensor], targets: dict[int, Tensor]) -> _Sent:
        with self._mailbox.aside():
            for rank, rows in leaving.items():
                targets[rank].copy_(rows, non_blocking=True)
            slot.meet()
            return _Sent(self._mailbox.mark(), [*leaving.values()])


class DirectRows(_Direct):
    """Implements `exchange.RowExchange`: slots for the keys and values of two blocks, used in turn.

    A slot is free when it is used again. A rank sends the keys of a block only after it received the others'
    values of the previous block. They sent these values after they had read the slots of the block before.
    """

    def __init__(self, mailbox: Mailbox, index: int, size: int) -> None:
        super().__init__(mailbox, index, size, slots=4)

    def spread(self, rows: Tensor, counts: list[int]) -> Arriving[Tensor]:
        shape, dtype = (sum(counts), *rows.shape[1:]), rows.dtype
        slot, rows = self._take(shape, dtype), rows.contiguous()
        first = starts(counts)[self.index]
        mine = slice(first, first + counts[self.index])
        own = slot.view(self.index, shape, dtype)
        own[mine].copy_(rows)
        targets = {rank: slot.view(rank, shape, dtype)[mine] for rank in self._others()}
        return Converted(self._send(slot, dict.fromkeys(targets, rows), targets), lambda _: own)


class DirectHeads(_Direct):
    """Implements `exchange.HeadExchange`: one slot for each exchange in the attention of a block.

    A slot is free when it is used again. A rank sends v of the next block only after it received the others'
    results of this block. They sent these results after they had read v. The same holds for the other slots.
    """

    def __init__(self, mailbox: Mailbox, index: int, size: int, pieces: int = 1) -> None:
        super().__init__(mailbox, index, size, slots=4 * pieces)

    def to_heads(self, x_BlHD: Tensor, span: slice, counts: list[int]) -> Arriving[Tensor]:
        parts = x_BlHD.unflatten(2, (self.size, -1))[:, :, :, span].transpose(0, 1)
        first = starts(counts)[self.index]
        shape = (sum(counts), *parts.shape[1:2], *parts.shape[3:])
        slot = self._take(shape, x_BlHD.dtype)
        leaving = {rank: parts[:, :, rank].contiguous() for rank in self._others()}
        own = slot.view(self.index, shape, x_BlHD.dtype)
        own[first : first + counts[self.index]].copy_(parts[:, :, self.index])
        targets = {
            rank: slot.view(rank, shape, x_BlHD.dtype)[first : first + counts[self.index]] for rank in leaving
        }
        return Converted(self._send(slot, leaving, targets), lambda _: own)

    def to_tokens(self, out_LBhD: Tensor, counts: list[int]) -> Arriving[list[Tensor]]:
        parts = out_LBhD.split(counts)
        rest, dtype = out_LBhD.shape[1:], out_LBhD.dtype
        slot = self._take((self.size * max(counts), *rest), dtype)
        leaving = {rank: parts[rank].contiguous() for rank in self._others()}
        targets = {
            rank: slot.view(rank, (self.size, counts[rank], *rest), dtype)[self.index] for rank in leaving
        }
        arrived = slot.view(self.index, (self.size, counts[self.index], *rest), dtype)

        def by_rank(_: None) -> list[Tensor]:
            return [parts[rank] if rank == self.index else arrived[rank] for rank in range(self.size)]

        return Converted(self._send(slot, leaving, targets), by_rank)


class _Sent:
    """Keeps the sent tensors alive until the current stream has waited for the copies."""

    def __init__(self, wait_for_copies: Callable[[], None], held: list[Tensor]) -> None:
        self._wait_for_copies, self._held = wait_for_copies, held

    def wait(self) -> None:
        self._wait_for_copies()
        self._held.clear()


class DirectBorder(_Direct):
    """Implements `exchange.BorderExchange`: two slots, each for the row from above and the row from below.

    A slot is free when it is used again: all ranks meet in the swap between its two uses, and they meet after
    they have read it.
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
        for rank, target in arriving.items():
            target.copy_(arrived[int(rank > self.index)])
