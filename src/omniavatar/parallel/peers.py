"""Exchanges among a group of ranks: plain tensors, uneven row counts, any dtype, NCCL or gloo.

Everything travels as bytes, since nothing is added up: float8 needs no support from the backend, and what
arrives is equal to the bit. Rows are the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Pending:
    """Rows on their way; on CUDA `wait` makes the current stream wait, not the host."""

    def __init__(self, rows: Tensor, work: Any) -> None:
        self._rows, self._work = rows, work

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._rows


class Peers:
    """One rank's view of a group. index: its place in the group."""

    def __init__(self, group: dist.ProcessGroup, index: int, size: int) -> None:
        self.group, self.index, self.size = group, index, size

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Send `send[j]` rows to rank j, in order, and get `receive[j]` from it, in order."""
        rows = rows.contiguous()
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        work = dist.all_to_all_single(
            _bytes(out), _bytes(rows), list(receive), list(send), group=self.group, async_op=True
        )
        return Pending(out, work)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """`all_to_all` for what is needed at once: on CUDA it runs on the current stream."""
        rows = rows.contiguous()
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(_bytes(out), _bytes(rows), list(receive), list(send), group=self.group)
        return out

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, `counts[j]` of rank j."""
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
    """Fill `out` with every rank's `piece`, one behind the other; what to wait for unless `wait`."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, piece, group=group, async_op=not wait)
    return work
