"""The one order in which optimisations are applied to a loaded model: merge (loading) > quantise > fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from omniavatar.accel.float8 import Float8Form, apply_float8, check_float8, is_float8
from omniavatar.accel.fused_blocks import apply_fused_blocks
from omniavatar.checkpoint.dit import WeightForm
from omniavatar.model.dit import WanDiT
from omniavatar.ops.fused import FusedOps

Quantize = Literal["none", "fp8"]


@dataclass(frozen=True)
class AccelConfig:
    """quantize: float8 linear layers, or none (exact). fuse: element-wise work in single passes."""

    quantize: Quantize = "none"
    fuse: bool = False


def weight_form(config: AccelConfig, ops: FusedOps, device: torch.device) -> WeightForm | None:
    """The form weights take while they are loaded. Raises ResourceError for what the device cannot do."""
    if config.quantize == "none":
        return None
    check_float8(device)
    return Float8Form(ops)


def apply_accelerations(dit: WanDiT, config: AccelConfig, ops: FusedOps) -> None:
    """Change `dit` in place as configured; a model loaded in its `weight_form` is not quantised again.

    Raises ResourceError for what the device cannot do.
    """
    if config.quantize == "fp8" and not is_float8(dit):
        apply_float8(dit, ops)
    if config.fuse:
        apply_fused_blocks(dit, ops)
