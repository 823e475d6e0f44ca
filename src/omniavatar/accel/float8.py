"""Float8 (e4m3) linear layers in the blocks, one scale a row of weights and a row of activations.

What changes: q, k, v, o of self-attention, q and o of cross-attention and both feed-forward layers become
`Float8Linear`; keys and values of the text (made once a prompt), embeddings, modulation and head stay as they
are. Weights are quantised after the merge. What it loses: about 2.6 % relative error a product (3 mantissa
bits), 2 to 4 % of a whole forward on random weights; measure it beside the speed.
Source: FP8 formats for deep learning (arXiv 2209.05433); row-wise scaling as in PyTorch's `_scaled_mm`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from omniavatar.errors import ResourceError
from omniavatar.model.dit import WanDiT
from omniavatar.ops.float8 import scaled_linear
from omniavatar.ops.fused import FusedOps, QuantRows, Rows, quantize_rows

QUANTIZED = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in "qo"),
    "ffn.0",
    "ffn.2",
)


class Float8Linear(nn.Module):
    """A linear layer with float8 weights. Takes plain rows (and quantises them) or quantised ones."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, ops: FusedOps
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.dtype = dtype
        self._ops = ops

    @classmethod
    def from_linear(cls, linear: nn.Linear, ops: FusedOps) -> Float8Linear:
        """Quantise the rows of a layer's weight; the output dtype is the layer's."""
        rows = quantize_rows(linear.weight.detach().float())
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(rows.data, rows.scale, bias, linear.weight.dtype, ops)

    def forward(self, x: Rows) -> Tensor:
        rows = x if isinstance(x, QuantRows) else self._ops.quantize(x)
        return scaled_linear(rows, self.weight, self.weight_scale, self.bias, self.dtype)


def check_float8(device: torch.device) -> None:
    """Raise ResourceError where the device has no float8 product (the CPU runs the slow twin)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ResourceError(
            f"quantize: {name} has no float8 units (compute capability 8.9); use quantize=none"
        )


def apply_float8(dit: WanDiT, ops: FusedOps) -> None:
    """Replace the layers named in `QUANTIZED` in every block, in place, one layer at a time."""
    check_float8(next(dit.parameters()).device)
    for block in dit.blocks:
        for name in QUANTIZED:
            parent, _, leaf = name.rpartition(".")
            linear = cast(nn.Linear, block.get_submodule(name))
            setattr(block.get_submodule(parent), leaf, Float8Linear.from_linear(linear, ops))
