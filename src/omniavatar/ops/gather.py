"""An all-gather of equal pieces under the name the installed torch has for it."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def gather_into(out: Tensor, piece: Tensor, group: dist.ProcessGroup, wait: bool = True) -> dist.Work | None:
    """Fill `out` with every rank's `piece`, one behind the other; what to wait for unless `wait`."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = gather(out, piece, group=group, async_op=not wait)
    return work
