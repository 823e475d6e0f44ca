"""Host memory that a CUDA device reads at full speed: page-locked, of exactly the requested size.

PyTorch's pinned allocator rounds up to powers of two, which takes 1.8 times the memory for blocks of 0.6 GB.
Here whole pages are mapped and registered with CUDA, and unregistered when their last tensor is freed.
Host to device on an H100: 55 GB/s, against 3.9 GB/s from pageable memory.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from omniavatar.errors import ResourceError
from omniavatar.types import bytes_text


def host_buffer(size: int, device: torch.device) -> Tensor:
    """`size` bytes of host memory as uint8, locked for copies to `device` if that is a CUDA device.

    Raises ResourceError if the host cannot allocate or lock that much.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, max(size, 1))
    except OSError as error:
        raise ResourceError(_refusal(size, str(error))) from None
    buffer = torch.frombuffer(pages, dtype=torch.uint8, count=size)
    address = buffer.data_ptr()
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = int(cudart.cudaHostRegister(address, size, 1))
    if status != 0:
        raise ResourceError(_refusal(size, f"CUDA error {status}"))
    weakref.finalize(pages, _unregister, address).atexit = False
    return buffer


def host_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` in memory from `host_buffer`."""
    source = tensor.detach().contiguous()
    buffer = host_buffer(source.numel() * source.itemsize, device)
    return buffer.view(source.dtype).view(source.shape).copy_(source)


def host_memory() -> tuple[int, int]:
    """(available, total) bytes of the host; available is the total if /proc/meminfo is missing."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return total, total
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024, total


def check_host_room(size: int, memory: Callable[[], tuple[int, int]] = host_memory) -> None:
    """Raise ResourceError if the host has less than `size` bytes: the process would be killed later."""
    available = memory()[0]
    if size > available:
        raise ResourceError(_refusal(size, f"{bytes_text(available)} are available"))


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _refusal(size: int, reason: str) -> str:
    return (
        f"memory: {bytes_text(size)} of host memory for streamed weights cannot be allocated ({reason}); "
        "raise memory (or num_persistent_param_in_dit), use quantize=fp8, or free host memory"
    )
