"""Several processes that train one model: each draws its own data, and gradients are averaged.

torchrun starts one process per GPU (NCCL) or CPU (gloo). Weights, moments and averaged weights are equal on
all ranks, since all start with the same values and take the same steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TrainingRanks:
    """This process among `count` processes; the one with `index` 0 measures, prints and writes."""

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> tuple[TrainingRanks, torch.device]:
        """The ranks started by torchrun, or this process alone, and the device of this rank."""
        cuda = torch.cuda.is_available()
        count = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if count == 1:
            return cls(), device
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        return cls(dist.get_rank(), count), device

    @property
    def leads(self) -> bool:
        return self.index == 0

    def average(self, gradients: Tensor) -> None:
        """Replace the gradients, one flat tensor, by their mean over the ranks."""
        if self.count > 1:
            dist.all_reduce(gradients)
            gradients /= self.count

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true on any rank; all ranks get the same answer."""
        if self.count == 1:
            return flag
        highest = torch.tensor(int(flag), device=device)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(highest)

    def leave(self) -> None:
        """Disconnect from the other ranks."""
        if self.count > 1:
            dist.destroy_process_group()
