"""The one order in which optimisations are applied to a loaded model: merge (loading) > quantise > fuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omniavatar.accel.float8 import apply_float8
from omniavatar.accel.fused_blocks import apply_fused_blocks
from omniavatar.model.dit import WanDiT
from omniavatar.ops.fused import FusedOps

Quantize = Literal["none", "fp8"]


@dataclass(frozen=True)
class AccelConfig:
    """quantize: float8 linear layers, or none (exact). fuse: element-wise work in single passes."""

    quantize: Quantize = "none"
    fuse: bool = False


def apply_accelerations(dit: WanDiT, config: AccelConfig, ops: FusedOps) -> None:
    """Change `dit` in place as configured. Raises ResourceError for what the device cannot do."""
    if config.quantize == "fp8":
        apply_float8(dit, ops)
    if config.fuse:
        apply_fused_blocks(dit, ops)
