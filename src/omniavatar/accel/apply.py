"""The order of what is applied to a loaded model: merge (while loading) > quantise > fuse > text."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omniavatar.accel.fused_blocks import apply_fused_blocks
from omniavatar.accel.kernels.rows import FP8, FusedOps
from omniavatar.accel.precision import PRECISIONS, check_quantize
from omniavatar.accel.quantized import QuantForm, apply_quantization, is_quantized
from omniavatar.accel.short_text import apply_short_text
from omniavatar.checkpoint.dit import WeightForm
from omniavatar.model.dit import WanDiT

"""A name of `accel.precision.PRECISIONS`."""


@dataclass(frozen=True)
class AccelConfig:
    """quantize: precision of the linear layers. fuse: element-wise work in single passes."""

    quantize: str = "none"
    fuse: bool = False


def weight_form(config: AccelConfig, ops: FusedOps, device: torch.device) -> WeightForm | None:
    """The form that weights take while they are loaded, None for their own. ops: made for `row_dtype`.

    Raises ResourceError if the device lacks the precision.
    """
    if PRECISIONS.get(config.quantize).create() is None:
        return None
    check_quantize(config.quantize, device)
    return QuantForm(ops)


def row_dtype(quantize: str) -> torch.dtype:
    """The dtype that rows are quantised to; float8 if nothing is quantised."""
    return PRECISIONS.get(quantize).create() or FP8


def apply_accelerations(dit: WanDiT, config: AccelConfig, ops: FusedOps) -> None:
    """Change `dit` in place as configured; a model loaded in its `weight_form` is not quantised again.

    Raises ResourceError if the device lacks the precision.
    """
    if config.quantize != "none" and not is_quantized(dit):
        apply_quantization(dit, ops)
    if config.fuse:
        apply_fused_blocks(dit, ops)
    if dit.head.head.weight.device.type == "cpu":
        apply_short_text(dit)
