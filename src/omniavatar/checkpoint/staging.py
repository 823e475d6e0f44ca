"""Copies weights from files to a CUDA device through two page-locked buffers.

While one buffer is copied to the device, threads read the next bytes into the other. Reading into ordinary
memory costs a page fault every 4 KiB and then a copy at a few GB/s; from page-locked memory the copy runs at
bus speed, in parallel with the reading. On other devices the buffers are ordinary memory.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omniavatar.checkpoint.reader import TensorFiles

CHUNK_BYTES = 64 << 20
THREADS = 4
SMALL_BYTES = 1 << 20


class _Buffer:
    def __init__(self, size: int, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self.data = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
        self._sent = torch.cuda.Event() if on_cuda else None

    def wait(self) -> None:
        """Wait until the device has copied the buffer."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, target: Tensor) -> None:
        target.copy_(self.data[: len(target)], non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Staging:
    """Loads tensors to one device; a context manager that owns the buffers and the reader threads."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device, self._chunk = device, chunk_bytes
        self._buffers = itertools.cycle([_Buffer(chunk_bytes, device) for _ in range(2)])
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="weights")

    def load(self, files: TensorFiles, key: str) -> Tensor:
        """The tensor `key` on the device, in the stored dtype. Raises CheckpointError for damaged data."""
        info = files.info(key)
        tensor = torch.empty(info.shape, dtype=info.dtype, device=self._device)
        target = tensor.view(-1).view(torch.uint8) if info.num_bytes else tensor
        for start in range(0, info.num_bytes, self._chunk):
            size = min(self._chunk, info.num_bytes - start)
            buffer = next(self._buffers)
            buffer.wait()
            self._read(files, key, start, buffer.data[:size])
            buffer.send(target[start : start + size])
        return tensor

    def _read(self, files: TensorFiles, key: str, start: int, out: Tensor) -> None:
        if len(out) <= SMALL_BYTES:
            files.read(key, start, out)
            return
        part = -(-len(out) // THREADS)
        offsets = range(0, len(out), part)
        reads = [
            self._pool.submit(files.read, key, start + offset, out[offset : offset + part])
            for offset in offsets
        ]
        for read in reads:
            read.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
