"""The one order in which optimisations are applied to the DiT.

1. merge: LoRA pairs are added to their weights while files are read, so later steps see plain layers.
2. quantise: in the same pass, so a weight is quantised once, and exact weights never fill the device.
3. fuse: after quantising, because a fused pass produces the rows that a quantised layer takes.
4. shard: after fusing, because it replaces the attention that fused blocks call.
5. shared weights: each rank keeps its share of the blocks, once every tensor has its final form.
6. offload: last of the steps that move tensors; blocks that do not stay go to host memory.
7. graphs: capture the launches that steps 1 to 6 leave, only if no block is streamed.
8. step cache: wraps the blocks from outside, for each window, so that it skips all of the above.

Steps 1 to 5 are below. `Residency.hold` does 6 and 7 as the placement says; `WindowGenerator` does 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from omniavatar.accel.apply import AccelConfig, apply_accelerations, row_dtype, weight_form
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.parallel.weights import apply_shared_weights

if TYPE_CHECKING:
    import torch

    from omniavatar.checkpoint.dit import WeightForm
    from omniavatar.config.schema import RuntimeConfig
    from omniavatar.model.dit import WanDiT
    from omniavatar.parallel.team import Team

LoadDiT = Callable[["WeightForm | None"], "WanDiT"]


def accelerated_dit(
    load: LoadDiT, quantize: str, runtime: RuntimeConfig, team: Team, device: torch.device
) -> WanDiT:
    """The DiT with every optimisation that changes its weights or modules.

    - load: reads and merges the weights, in the given form.

    Raises CheckpointError, ResourceError.
    """
    accel, ops = AccelConfig(quantize, runtime.fuses(device.type)), create_fused(device, row_dtype(quantize))
    dit = load(weight_form(accel, ops, device))  # 1 merge, 2 quantise
    apply_accelerations(dit, accel, ops)  # 2 quantise where loading did not, 3 fuse
    team.apply(dit)  # 4 shard
    peers = team.weight_peers() if runtime.use_fsdp else None
    if peers is not None:
        apply_shared_weights(dit, peers, device)  # 5 shared weights
    return dit
