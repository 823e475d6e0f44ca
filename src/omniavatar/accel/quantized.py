"""Linear layers of the blocks in float8 (e4m3) or int8, one scale for each row of weights and activations.

What changes: q, k, v, o of self-attention, q and o of cross-attention and both feed-forward layers become
`QuantLinear`. Keys and values of the text (made once for a prompt), embeddings, modulation and head are
unchanged. Weights are quantised after the merge.
What it loses: float8 has about 2.6 % relative error a product (3 mantissa bits), and 1.5 to 4 % a forward on
random weights. int8 has about 1 % a product on even rows and more on rows with outliers, where float8 is
better. Measure the error together with the speed.
Limits: float8 needs compute capability 8.9, int8 8.0; the CPU runs slow equivalents.
Source: FP8 formats for deep learning (arXiv 2209.05433), LLM.int8() (arXiv 2208.07339); row-wise scaling as
in PyTorch's `_scaled_mm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from omniavatar.accel.kernels.rows import FusedOps, QuantRows, Rows, quantize_rows
from omniavatar.accel.kernels.scaled import scaled_linear
from omniavatar.accel.precision import PRECISIONS, QUANTIZED, check_quantize
from omniavatar.checkpoint.strict import TensorSource
from omniavatar.model.dit import WanDiT


class QuantLinear(nn.Module):
    """A linear layer with float8 or int8 weights. It takes quantised rows, or quantises plain rows."""

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
    def from_linear(cls, linear: nn.Linear, ops: FusedOps) -> QuantLinear:
        """The layer with the rows of its weight quantised; the output dtype is unchanged."""
        rows = quantize_rows(linear.weight.detach().float(), ops.row_dtype)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(rows.data, rows.scale, bias, linear.weight.dtype, ops)

    def forward(self, x: Rows) -> Tensor:
        rows = x if isinstance(x, QuantRows) else self._ops.quantize(x)
        return scaled_linear(rows, self.weight, self.weight_scale, self.bias, self.dtype)


@dataclass(frozen=True)
class QuantForm:
    """How merged weights become float8 or int8 while they are loaded (`checkpoint.dit.WeightForm`).

    The weights are quantised one at a time on the device, each from the float32 sum of the merge.
    """

    ops: FusedOps

    @property
    def name(self) -> str:
        """The value of `quantize` that stands for this form: fp8 or int8."""
        return next(each.name for each in PRECISIONS if each.create() == self.ops.row_dtype)

    def prepare(self, model: WanDiT) -> None:
        """Replace the layers named in `QUANTIZED` in every block, in place."""
        for block in model.blocks:
            for name in QUANTIZED:
                parent, _, leaf = name.rpartition(".")
                linear = cast(nn.Linear, block.get_submodule(name))
                setattr(block.get_submodule(parent), leaf, QuantLinear.from_linear(linear, self.ops))

    def convert(self, sources: Mapping[str, TensorSource], device: torch.device) -> dict[str, TensorSource]:
        """The sources, with two for each quantised weight: data and scales."""
        converted: dict[str, TensorSource] = {}
        for key, source in sources.items():
            converted |= (
                _quantized(key, source, device, self.ops.row_dtype) if _quantized_key(key) else {key: source}
            )
        return converted


def _quantized_key(key: str) -> bool:
    _, _, rest = key.removeprefix("blocks.").partition(".")
    return key.startswith("blocks.") and rest.removesuffix(".weight") in QUANTIZED


def _quantized(
    key: str, source: TensorSource, device: torch.device, row_dtype: torch.dtype
) -> dict[str, TensorSource]:
    scales: list[Tensor] = []

    def data() -> Tensor:
        rows = quantize_rows(source.load().to(device).float(), row_dtype)
        scales.append(rows.scale)
        return rows.data

    scale_shape = (*source.shape[:-1], 1)
    return {
        key: TensorSource(source.shape, data, source.parts),
        f"{key}_scale": TensorSource(scale_shape, scales.pop, source.parts),
    }


def is_quantized(dit: WanDiT) -> bool:
    """Whether the model's layers are quantised already."""
    return any(isinstance(module, QuantLinear) for module in dit.modules())


def apply_quantization(dit: WanDiT, ops: FusedOps) -> None:
    """Quantise a loaded model in place, one layer at a time."""
    form = QuantForm(ops)
    check_quantize(form.name, next(dit.parameters()).device)
    form.prepare(dit)
