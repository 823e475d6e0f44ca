"""Block-sparse attention in float8 on Hopper GPUs, by `kernels.sparse_gluon`.

Rounds q, k and v to e4m3 as `fa3.Fa3Float8Attention` does: rotated q and k are of order one and are cast as
they are, v gets a scale a head. The softmax's weights are rounded too; sums are float32.

Shapes: B batch, L tokens, H heads of 128 channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from omniavatar.accel.attention.sparse import BlockLists, check_tokens
from omniavatar.accel.kernels.rows import FP8, FP8_MAX, head_scales
from omniavatar.accel.kernels.sparse_gluon import sparse_kernel, transpose_kernel

BLOCK = WIDTH = 128
STAGES = 4
"""Blocks in flight; three and five are as fast."""


class Float8SparseAttention:
    """A `SparseAttentionFn`; q and k may come in float8, v comes in the dtype of the result."""

    takes_float8 = True

    def __init__(self) -> None:
        self._layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists) -> Tensor:
        check_tokens(q_BLHD, k_BLHD, lists)
        if lists.block != BLOCK or q_BLHD.shape[-1] != WIDTH:
            raise ValueError(
                f"the float8 kernel takes blocks of {BLOCK} tokens and heads of {WIDTH} channels, not blocks "
                f"of {lists.block} and heads of {q_BLHD.shape[-1]}"
            )
        out = torch.empty(v_BLHD.shape, dtype=v_BLHD.dtype, device=v_BLHD.device)
        q, k = _rounded(q_BLHD), _rounded(k_BLHD)
        for entry in range(len(out)):
            self.attend(q[entry], k[entry], v_BLHD[entry], out[entry], lists)
        return out

    def attend(self, q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, out_LHD: Tensor, lists: BlockLists) -> None:
        """One batch entry: float8 q and k, contiguous; the result goes into `out`."""
        tokens, heads, _ = v_LHD.shape
        blocks = lists.counts.shape[1]
        v, scales = self.transposed(v_LHD)
        sparse_kernel[(blocks * heads,)](
            self._descriptor(q_LHD.flatten(1)),
            self._descriptor(k_LHD.flatten(1)),
            self._descriptor(v),
            out_LHD,
            scales,
            lists.counts,
            lists.indices,
            tokens,
            blocks,
            lists.indices.shape[-1],
            heads,
            WIDTH**-0.5 * math.log2(math.e),
            STAGES=STAGES,
            num_warps=4,
        )

    def transposed(self, v_LHD: Tensor) -> tuple[Tensor, Tensor]:
        """Values as the kernel reads them, (H*128, L in whole blocks) float8, and the scale of each head."""
        tokens, heads, width = v_LHD.shape
        if v_LHD.stride()[1:] != (width, 1):
            v_LHD = v_LHD.contiguous()
        blocks = -(-tokens // BLOCK)
        scales = head_scales(v_LHD[None])[0]
        out = torch.empty(heads * width, blocks * BLOCK, dtype=FP8, device=v_LHD.device)
        transpose_kernel[(blocks, heads)](
            v_LHD,
            scales,
            out,
            tokens,
            v_LHD.stride(0),
            out.shape[1],
            head_dim=width,
            LIMIT=FP8_MAX,
            num_warps=8,
        )
        return out, scales

    def _descriptor(self, x: Tensor) -> Any:
        return TensorDescriptor.from_tensor(x, [BLOCK, BLOCK], self._layout)


def _rounded(x: Tensor) -> Tensor:
    return (x if x.dtype == FP8 else x.clamp(-FP8_MAX, FP8_MAX).to(FP8)).contiguous()
