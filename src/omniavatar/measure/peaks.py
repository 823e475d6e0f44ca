"""Peak memory of this process, for reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omniavatar.engine.sidecar import peak_memory
from omniavatar.types import bytes_text


@dataclass(frozen=True)
class PeakMemory:
    """Most memory the process has held so far, bytes; None where it is not known (the GPU: without CUDA)."""

    peak_gpu_bytes: int | None
    peak_host_bytes: int | None

    @classmethod
    def now(cls, device: torch.device) -> PeakMemory:
        """The peaks until now of this process, which runs on `device`."""
        return cls(**peak_memory(device))

    @property
    def text(self) -> str:
        """The known peaks as one phrase."""
        known = ((self.peak_gpu_bytes, "on the GPU"), (self.peak_host_bytes, "on the host"))
        return ", ".join(f"{bytes_text(count)} {place}" for count, place in known if count is not None)
