"""Ranks that are threads of this process and exchange tensors through shared memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omniavatar.parallel.peers import Peers, Pending


class Board:
    """The shared memory through which ranks, which are threads of this process, exchange rows."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.left: dict[int, Sequence[Tensor]] = {}


class ThreadPeers(Peers):
    """Exchanges between threads on one device; all of them use its default stream."""

    def __init__(self, board: Board, index: int, size: int) -> None:
        self._board, self.index, self.size = board, index, size

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        parts = self._swap(rows.split(list(send)))
        assert [len(part) for part in parts] == list(receive)
        return Pending(torch.cat(parts), None)

    def exchange(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self.all_to_all(rows, send, receive).wait()

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        parts = self._swap([rows] * self.size)
        assert [len(part) for part in parts] == list(counts)
        return torch.cat(parts)

    def _swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self._board.left[self.index] = parts
        self._board.barrier.wait(60)
        got = [self._board.left[rank][self.index] for rank in range(self.size)]
        self._board.barrier.wait(60)
        return got


def on_threads(size: int, work: Callable[[int], Any]) -> list[Any]:
    """The results of `work(rank)`, run in one thread per rank."""
    found: dict[int, Any] = {}

    def keep(rank: int) -> None:
        with torch.inference_mode():
            found[rank] = work(rank)

    threads = [threading.Thread(target=keep, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == size
    return [found[rank] for rank in range(size)]
