"""One of several processes that make a video: its rank, and how it connects and disconnects.

torchrun and `parallel.launch` pass the rank in environment variables. A process that fails exits at once: the
others may be blocked in an exchange with it, and the supervisor kills them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from omniavatar.errors import ConfigError
from omniavatar.parallel.ranks import STEP_TIMEOUT, Ranks
from omniavatar.text import quoted

STORE_VARIABLE = "OMNIAVATAR_STORE"
"""Environment variable with the file through which processes started by `parallel.launch` find each other."""
POLL_S = 1.0
_LOST_PEER_TEXTS = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket")


@dataclass(frozen=True)
class Process:
    """Rank of one process.

    local_rank: rank among the processes of its machine.
    world: number of processes.
    store: file through which they find each other, set by `parallel.launch`.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    store: str | None = None

    @classmethod
    def from_environment(cls) -> Process:
        """The rank in RANK, LOCAL_RANK and WORLD_SIZE; by default one process. Raises ConfigError."""
        rank, local, world = (
            _number(name, default) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        )
        if world < 1 or rank >= world or local >= world:
            raise ConfigError(
                f"RANK {rank}, LOCAL_RANK {local}, WORLD_SIZE {world}: ranks count from 0 and are below "
                "WORLD_SIZE; unset these variables, or start the command with torchrun"
            )
        return cls(rank, local, world, os.environ.get(STORE_VARIABLE))

    @property
    def leads(self) -> bool:
        return self.rank == 0


def _number(name: str, default: int) -> int:
    """The whole number in an environment variable."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(
            f"{name}: {quoted(text)} is not a number; unset this variable, or start the command with torchrun"
        )
    return int(text)


def connect(process: Process, device: torch.device) -> Ranks:
    """Connect to the other processes. Tensors use NCCL on CUDA and gloo on a CPU; orders use gloo."""
    if process.store is not None:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if not process.leads:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=None if process.store is None else FileStore(process.store, process.world),
        rank=process.rank,
        world_size=process.world,
        timeout=STEP_TIMEOUT,
    )
    return Ranks(device)


def disconnect() -> None:
    """Disconnect from the other processes, after the last exchange."""
    dist.destroy_process_group()


def is_connected() -> bool:
    return dist.is_available() and dist.is_initialized()


def lost_another(error: BaseException) -> bool:
    """Whether an exchange failed because another process died or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LOST_PEER_TEXTS)


def exit_now(code: int) -> None:
    """End this process without waiting for threads, queues or other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
