"""Which implementation of the fused rows a device gets."""

from __future__ import annotations

import torch

from omniavatar.accel.kernels.rows import FP8, EagerOps, FusedOps


def create_fused(device: torch.device, row_dtype: torch.dtype = FP8) -> FusedOps:
    """The passes for a device: Triton kernels on CUDA, the eager twins elsewhere."""
    if device.type != "cuda":
        return EagerOps(row_dtype)
    from omniavatar.accel.kernels.fused_triton import TritonOps

    return TritonOps(row_dtype=row_dtype)
