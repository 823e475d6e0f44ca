"""Float8 (e4m3) linear layers in the blocks, one scale a row of weights and a row of activations.

What changes: q, k, v, o of self-attention, q and o of cross-attention and both feed-forward layers become
`Float8Linear`; keys and values of the text (made once a prompt), embeddings, modulation and head stay as they
are. Weights are quantised after the merge. What it loses: about 2.6 % relative error a product (3 mantissa
bits), 2 to 4 % of a whole forward on random weights; measure it beside the speed.
Source: FP8 formats for deep learning (arXiv 2209.05433); row-wise scaling as in PyTorch's `_scaled_mm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from omniavatar.checkpoint.strict import TensorSource
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


@dataclass(frozen=True)
class Float8Form:
    """How a checkpoint's merged weights become float8 while they are loaded (`checkpoint.dit.WeightForm`).

    Each weight is quantised from the float32 sum of the merge, on the device, one at a time.
    """

    ops: FusedOps
    name: str = "fp8"

    def prepare(self, model: WanDiT) -> None:
        """Replace the layers named in `QUANTIZED` in every block, in place."""
        for block in model.blocks:
            for name in QUANTIZED:
                parent, _, leaf = name.rpartition(".")
                linear = cast(nn.Linear, block.get_submodule(name))
                setattr(block.get_submodule(parent), leaf, Float8Linear.from_linear(linear, self.ops))

    def convert(self, sources: Mapping[str, TensorSource], device: torch.device) -> dict[str, TensorSource]:
        """Each quantised weight as two sources, data and scales."""
        converted: dict[str, TensorSource] = {}
        for key, source in sources.items():
            converted |= _quantized(key, source, device) if _is_quantized(key) else {key: source}
        return converted


def _is_quantized(key: str) -> bool:
    _, _, rest = key.removeprefix("blocks.").partition(".")
    return key.startswith("blocks.") and rest.removesuffix(".weight") in QUANTIZED


def _quantized(key: str, source: TensorSource, device: torch.device) -> dict[str, TensorSource]:
    scales: list[Tensor] = []

    def data() -> Tensor:
        rows = quantize_rows(source.load().to(device).float())
        scales.append(rows.scale)
        return rows.data

    scale_shape = (*source.shape[:-1], 1)
    return {key: TensorSource(source.shape, data), f"{key}_scale": TensorSource(scale_shape, scales.pop)}


def is_float8(dit: WanDiT) -> bool:
    """Whether the model's layers are float8 already."""
    return any(isinstance(module, Float8Linear) for module in dit.modules())


def check_float8(device: torch.device) -> None:
    """Raise ResourceError where the device has no float8 product (the CPU runs the slow twin)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ResourceError(
            f"quantize: {name} has no float8 units (compute capability 8.9); use quantize=none"
        )


def apply_float8(dit: WanDiT, ops: FusedOps) -> None:
    """Quantise a loaded model in place, one layer at a time."""
    check_float8(next(dit.parameters()).device)
    Float8Form(ops).prepare(dit)
