"""A group of worker processes, kept for the tests of a module, that runs a function on all of them at once.

On a CPU they use gloo; with `device="cuda"` each has a GPU and they use NCCL.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LONGEST_S = 120


class RankPool:
    """`size` processes; `run(function, *args)` calls `function(team, *args)` on each, a `Ranks` team."""

    def __init__(self, size: int, folder: Path, device: str = "cpu") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["omniavatar.engine.pipeline", "torch.distributed"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, str(folder / f"store{size}"), device, theirs)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The result of each rank. Raises AssertionError with the tracebacks of failed ranks."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(LONGEST_S), f"rank {rank} hangs"
            good, value = pipe.recv()
            results.append(value)
            if not good:
                failures.append(f"rank {rank}: {value}")
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(rank: int, size: int, store: str, device: str, pipe: Connection) -> None:
    import torch

    from omniavatar.parallel.process import Process, connect

    torch.set_num_threads(1)
    team = connect(Process(rank, rank, size, store), torch.device(device, rank if device == "cuda" else None))
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(team, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
