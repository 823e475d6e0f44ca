"""Exchanges in a group of ranks: plain tensors, uneven row counts, any dtype, NCCL or gloo.

Tensors are sent as bytes, so the backend need not support float8 and the received values are bit-identical.
Rows are the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Pending:
    """Rows in transit. On CUDA, `wait` makes the current stream wait, not the host."""

    def __init__(self, rows: Tensor, work: Any) -> None:
        self._rows, self._work = rows, work

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._rows


class Peers:
    """A group of ranks, as one rank sees it.

    index: index of this rank in the group.
    """

    def __init__(self, group: dist.ProcessGroup, index: int, size: int) -> None:
        self.group, self.index, self.size = group, index, size

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Send `send[j]` rows to rank j and receive `receive[j]` rows from it, both in order of the ranks."""
        rows = rows.contiguous()
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        work = dist.all_to_all_single(
            _bytes(out), _bytes(rows), list(receive), list(send), group=self.group, async_op=True
        )
        return Pending(out, work)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Blocking `all_to_all`; on CUDA it runs on the current stream."""
        rows = rows.contiguous()
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(_bytes(out), _bytes(rows), list(receive), list(send), group=self.group)
        return out

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks in order; `counts[j]` rows come from rank j."""
        most = max(counts)
        if len(rows) < most:
            rows = torch.cat([rows, rows.new_zeros((most - len(rows), *rows.shape[1:]))])
        rows = rows.contiguous()
        out = rows.new_empty((self.size * most, *rows.shape[1:]))
        gather_into(_bytes(out), _bytes(rows), self.group)
        if min(counts) == most:
            return out
        parts = out.split(most)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _bytes(rows: Tensor) -> Tensor:
    return rows.flatten(1).view(torch.uint8)


def gather_into(out: Tensor, piece: Tensor, group: dist.ProcessGroup, wait: bool = True) -> dist.Work | None:
    """Fill `out` with the `piece` of every rank, in order. Returns the pending work if `wait` is False."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, piece, group=group, async_op=not wait)
    return work
