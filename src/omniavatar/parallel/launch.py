"""Starts the processes of one video on this machine and ends them together, as torchrun does.

When one process fails, the others are killed. A process that exits reports its own error; one killed by a
signal is reported here. This file does not need torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence

from omniavatar.errors import ResourceError
from omniavatar.media.temporary import temporary_folder

POLL_S = 0.1
INTERRUPT_S = 30.0
"""After Ctrl-C, how long the leader may take to save finished windows. Also how long the other ranks may run
after the leader has ended."""
TERM_S = 5.0


def launch(command: Sequence[str], names: Sequence[str]) -> int:
    """Run `command` once per name; returns the exit code of the first process that fails, or 0.

    Each process reads its rank from RANK, LOCAL_RANK and WORLD_SIZE.

    names: names of the processes in errors.

    Raises ResourceError if a process is killed by a signal.
    """
    with temporary_folder("ranks") as folder:
        shared = {"WORLD_SIZE": str(len(names)), "OMNIAVATAR_STORE": str(folder / "store")}
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(len(names)):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env={**os.environ, **shared, **ranks}))
            return _supervise(processes, names)
        except KeyboardInterrupt:
            _wait(processes[:1], INTERRUPT_S)
            raise
        finally:
            _end(processes)


def _supervise(processes: Sequence[subprocess.Popen[bytes]], names: Sequence[str]) -> int:
    done: float | None = None
    while True:
        codes = [process.poll() for process in processes]
        for code, name in zip(codes, names, strict=True):
            if code is not None and code < 0:
                raise ResourceError(
                    f"{name}: its process was killed by {signal_name(-code)} (out of host memory?); "
                    "finished windows are kept, and the same command continues after them"
                )
            if code:
                return code
        if all(code == 0 for code in codes):
            return 0
        if codes[0] == 0:
            done = done or time.monotonic()
            if time.monotonic() - done > INTERRUPT_S:
                return 0
        time.sleep(POLL_S)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        time.sleep(POLL_S)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    _wait(processes, TERM_S)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
