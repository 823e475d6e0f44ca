"""The implementation of the fused passes for a device."""

from __future__ import annotations

import torch

from omniavatar.accel.kernels.rows import FP8, EagerOps, FusedOps


def create_fused(device: torch.device, row_dtype: torch.dtype = FP8) -> FusedOps:
    """Triton kernels on CUDA, plain PyTorch elsewhere."""
    if device.type != "cuda":
        return EagerOps(row_dtype)
    from omniavatar.accel.kernels.fused_triton import TritonOps

    return TritonOps(row_dtype=row_dtype)
