"""Several processes that train one model: each draws data of its own, gradients are averaged.

Started by torchrun, one process a GPU (NCCL) or CPU (gloo). All ranks hold the same weights, moments and
averaged weights throughout, since they begin alike and take the same steps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; `index` 0 measures, prints and writes."""

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> tuple[Ranks, torch.device]:
        """The ranks that torchrun started, or this process alone; and this rank's device."""
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
        """Replace all gradients, one flat tensor, by their mean over ranks."""
        if self.count > 1:
            dist.all_reduce(gradients)
            gradients /= self.count

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` holds on any rank; all ranks get the same answer."""
        if self.count == 1:
            return flag
        said = torch.tensor(int(flag), device=device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def leave(self) -> None:
        """Give the connection up, where there is one."""
        if self.count > 1:
            dist.destroy_process_group()
