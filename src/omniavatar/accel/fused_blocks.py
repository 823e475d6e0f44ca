"""Transformer blocks with their element-wise work fused into single passes.

What changes: q, k and v come from one product with one packed weight; the tensors of the three layers become
views of it, and the state-dict keys are unchanged. Norms, modulation, rotation, gates and residual additions
are the passes of `kernels.rows.FusedOps`. The pass before a quantised linear layer returns quantised rows;
rotated q and k are float8 if the attention takes float8.
What it loses: rounding only (relative L2 about 1e-3 a forward in bf16).
Memory: tensors are freed as soon as they are used, so a block holds at most 8 tensors of the tokens' width
(residual before and after, q k v, rotated q and k, attention's result).
Source: AdaLN modulation of DiT (arXiv 2212.09748), fused as in serving engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.accel.kernels.rows import FP8, FusedOps, QuantRows, Rows
from omniavatar.accel.kernels.scaled import scaled_linear
from omniavatar.accel.quantized import QuantLinear
from omniavatar.model.attention import AttentionFn, TravellingAttention, takes_float8
from omniavatar.model.dit import WanDiT
from omniavatar.model.layers import Block, RMSNorm
from omniavatar.model.rope import RopeTable

Layer = nn.Linear | QuantLinear


@dataclass(frozen=True, eq=False)
class PackedProjection:
    """Several linear layers of one input as one product. `weight_scale` is None for weights not quantised."""

    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor | None
    dtype: torch.dtype
    layers: int

    @classmethod
    def pack(cls, layers: list[Layer]) -> PackedProjection:
        """Pack the layers' weights into one tensor and make the layers' weights views of it."""
        sizes = [layer.weight.shape[0] for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, weight.split(sizes), strict=True):
            layer.weight = part if isinstance(layer, QuantLinear) else nn.Parameter(part, requires_grad=False)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        scales = [layer.weight_scale for layer in layers if isinstance(layer, QuantLinear)]
        first = layers[0]
        return cls(
            weight,
            torch.cat(biases) if biases else None,
            torch.cat(scales) if scales else None,
            first.dtype if isinstance(first, QuantLinear) else weight.dtype,
            len(layers),
        )

    def part(self, index: int) -> PackedProjection:
        """One of the layers alone; all must have the same size."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.chunk(self.layers)[index]

        return PackedProjection(
            self.weight.chunk(self.layers)[index], cut(self.bias), cut(self.weight_scale), self.dtype, 1
        )

    def __call__(self, rows: Rows) -> Tensor:
        if isinstance(rows, QuantRows):
            assert self.weight_scale is not None
            return scaled_linear(rows, self.weight, self.weight_scale, self.bias, self.dtype)
        return F.linear(rows, self.weight, self.bias)


class FusedBlock(nn.Module):
    """Replaces `model.layers.Block`: same tensors, keys and signature."""

    def __init__(self, block: Block, ops: FusedOps) -> None:
        super().__init__()
        self.eps = block.eps
        self.num_heads = block.self_attn.num_heads
        self.self_attn = block.self_attn
        self.cross_attn = block.cross_attn
        self.norm3 = block.norm3
        self.ffn = block.ffn
        self.modulation = block.modulation
        own = block.self_attn
        self._qkv = PackedProjection.pack([own.q, own.k, own.v])
        self._norm3 = (block.norm3.weight.detach().float(), block.norm3.bias.detach().float())
        self._ops = ops

    def forward(
        self,
        x_BLC: Tensor,
        modulation_B6C: Tensor,
        rope: RopeTable,
        text: tuple[Tensor, Tensor],
        audio_BTC: Tensor | None,
        attention: AttentionFn,
        text_attention: AttentionFn | None = None,
    ) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = _vectors(self.modulation, modulation_B6C)
        ops, own, cross, eps, heads = self._ops, self.self_attn, self.cross_attn, self.eps, self.num_heads
        up, down = cast(Layer, self.ffn[0]), cast(Layer, self.ffn[2])

        x, rows = ops.norm(
            x_BLC, scale_a, shift_a, eps, frame_BTC=audio_BTC, quantize=self._qkv.weight_scale is not None
        )
        kind = FP8 if takes_float8(attention) else x.dtype
        if isinstance(attention, TravellingAttention):
            attended = self._attend_together(rows, rope, attention, kind)
            del rows
        else:
            q, k, v = self._qkv(rows).chunk(3, dim=-1)
            del rows
            q, k = self._rotated(q, own.norm_q, rope, kind), self._rotated(k, own.norm_k, rope, kind)
            attended = attention(q, k, v.unflatten(-1, (heads, -1)))
            del q, k, v
            attended = own.o(attended.flatten(-2))

        scale, shift = self._norm3
        x, rows = ops.norm(
            x, scale, shift, eps, update_BLC=attended, gate=gate_a, quantize=_is_quantized(cross.q)
        )
        del attended
        q = ops.rms(cross.q(rows), cross.norm_q.weight, eps).unflatten(-1, (heads, -1))
        del rows
        attended = (text_attention or attention)(q, *text)
        del q
        attended = cross.o(attended.flatten(-2))

        x, rows = ops.norm(x, scale_f, shift_f, eps, update_BLC=attended, quantize=_is_quantized(up))
        del attended
        hidden: Rows
        if _is_quantized(down):
            hidden = ops.quantize(up(rows), gelu=True)
        else:
            hidden = ops.linear_gelu(cast(Tensor, rows), up.weight, cast(Tensor, up.bias))
        del rows
        fed = down(hidden)
        del hidden
        return ops.add_gated(x, fed, gate_f)

    def _rotated(self, x: Tensor, norm: RMSNorm, rope: RopeTable, kind: torch.dtype) -> Tensor:
        return self._ops.rms_rotate(x, norm.weight, self.eps, rope.cos, rope.sin, self.num_heads, kind)

    def _attend_together(
        self, rows: Rows, rope: RopeTable, attention: TravellingAttention, kind: torch.dtype
    ) -> Tensor:
        """Self-attention and its output layer among several processes.

        v is sent while q is computed, and q while k is. Results of other processes' heads arrive while the
        product with the local heads runs.
        """
        own, heads = self.self_attn, self.num_heads
        v = attention.send(self._qkv.part(2)(rows).unflatten(-1, (heads, -1)))
        q = attention.send(self._rotated(self._qkv.part(0)(rows), own.norm_q, rope, kind))
        k = attention.send(self._rotated(self._qkv.part(1)(rows), own.norm_k, rope, kind))
        if isinstance(own.o, QuantLinear):
            out: Tensor = own.o(attention.attend(q, k, v).flatten(-2))
            return out
        return attention.attend_linear(q, k, v, own.o.weight, own.o.bias)


def _is_quantized(layer: nn.Module) -> bool:
    """Whether the layer takes quantised rows (float8 or int8)."""
    return isinstance(layer, QuantLinear)


def _vectors(modulation: Tensor, time_B6C: Tensor) -> list[Tensor]:
    """The six modulation vectors, (B, 1, C) float32 and contiguous; 1 is added to the scales."""
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation.float() + time_B6C.float()).split(
        1, dim=1
    )
    vectors = (shift_a, scale_a + 1, gate_a, shift_f, scale_f + 1, gate_f)
    return [vector.contiguous() for vector in vectors]


def apply_fused_blocks(dit: WanDiT, ops: FusedOps) -> None:
    """Replace every block in place: after quantisation, before sharding and offloading."""
    for index, block in enumerate(dit.blocks):
        dit.blocks[index] = FusedBlock(cast(Block, block), ops)
