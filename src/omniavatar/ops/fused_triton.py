"""Triton kernels of `ops.fused`: one program a token row, everything in registers between load and store.

All are bound by memory: at 3 TB/s a pass over (30,375 x 5120) bf16 takes 0.10 ms. Rows are padded to the next
power of two with masks. Float32 inside, one rounding outside, as the eager twins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omniavatar.ops.fused import FP8, FP8_MAX, QuantRows, Rows, head_scales


@triton.jit
def _norm_kernel(
    x_ptr, update_ptr, gate_ptr, frame_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr, out_scale_ptr,
    width, tokens, tokens_per_frame, gate_step, scale_step, eps,
    HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FRAME: tl.constexpr, QUANTIZE: tl.constexpr,
    FP8_LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    start = row * width
    x = tl.load(x_ptr + start + column, inside, 0.0).to(tl.float32)
    if HAS_UPDATE:
        update = tl.load(update_ptr + start + column, inside, 0.0).to(tl.float32)
        if HAS_GATE:
            gate = tl.load(gate_ptr + batch * gate_step + column, inside, 0.0)
            update = update * gate
        x = x + update
    if HAS_FRAME:
        frame = row // tokens_per_frame
        x = x + tl.load(frame_ptr + frame * width + column, inside, 0.0).to(tl.float32)
    if HAS_UPDATE or HAS_FRAME:
        stored = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + column, stored, inside)
        x = stored.to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    scale = tl.load(scale_ptr + batch * scale_step + column, inside, 0.0)
    shift = tl.load(shift_ptr + batch * scale_step + column, inside, 0.0)
    out = centred * rstd * scale + shift
    if QUANTIZE:
        largest = tl.max(tl.abs(out), 0)
        step = tl.maximum(largest / FP8_LIMIT, 1e-12)
        tl.store(out_scale_ptr + row, step)
        out = out / step
    tl.store(out_ptr + start + column, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _add_gated_kernel(
    x_ptr, update_ptr, gate_ptr, out_ptr, width, tokens, gate_step, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    start = row * width
    x = tl.load(x_ptr + start + column, inside, 0.0).to(tl.float32)
    update = tl.load(update_ptr + start + column, inside, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row // tokens) * gate_step + column, inside, 0.0)
    tl.store(out_ptr + start + column, (x + update * gate).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _rms_kernel(
    x_ptr, weight_ptr, out_ptr, width, row_step, batch_step, tokens, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = x_ptr + (row // tokens) * batch_step + (row % tokens) * row_step
    x = tl.load(place + column, inside, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    x = x * rstd * tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, x.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _rms_rotate_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, heads, row_step, batch_step, tokens, eps,
    HEAD_DIM: tl.constexpr, CLAMP: tl.constexpr, FP8_LIMIT: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    head = tl.arange(0, HEADS)
    column = head[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    inside = (head < heads)[:, None]
    width = heads * HEAD_DIM
    place = x_ptr + (row // tokens) * batch_step + token * row_step
    x = tl.load(place + column, inside, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(x * x, 1), 0) / width + eps)
    x = x * rstd * tl.load(weight_ptr + column, inside, 0.0).to(tl.float32)
    table = token * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)
    cos, sin = tl.load(cos_ptr + table)[None, :], tl.load(sin_ptr + table)[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, HEAD_DIM // 2, 2)))
    x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, HEAD_DIM))
    if CLAMP:
        x = tl.minimum(tl.maximum(x, -FP8_LIMIT), FP8_LIMIT)
    tl.store(out_ptr + row * width + column, x.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _quantize_kernel(
    x_ptr, out_ptr, out_scale_ptr, width, GELU: tl.constexpr, FP8_LIMIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, inside, 0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * inner)
    step = tl.maximum(tl.max(tl.abs(x), 0) / FP8_LIMIT, 1e-12)
    tl.store(out_scale_ptr + row, step)
    tl.store(out_ptr + row * width + column, (x / step).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _quantize_heads_kernel(
    x_ptr, scale_ptr, out_ptr, width, row_step, batch_step, tokens, heads,
    HEAD_DIM: tl.constexpr, FP8_LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + batch * batch_step + (row % tokens) * row_step + column, inside, 0.0).to(tl.float32)
    step = tl.load(scale_ptr + batch * heads + column // HEAD_DIM, inside, 1.0)
    x = tl.minimum(tl.maximum(x / step, -FP8_LIMIT), FP8_LIMIT)
    tl.store(out_ptr + row * width + column, x.to(out_ptr.dtype.element_ty), inside)


class TritonOps:
    """The kernels above behind `FusedOps`; CUDA tensors whose head width is a power of two.

    values_per_warp decides the warps of a row's program: row width / values_per_warp, 1 to 16.
    """

    def __init__(self, values_per_warp: int = 1024) -> None:
        self._values_per_warp = values_per_warp

    def _warps(self, block: int) -> int:
        return max(1, min(16, block // self._values_per_warp))

    def norm(
        self,
        x_BLC: Tensor,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        *,
        update_BLC: Tensor | None = None,
        gate: Tensor | None = None,
        frame_BTC: Tensor | None = None,
        quantize: bool = False,
    ) -> tuple[Tensor, Rows]:
        batch, tokens, width = x_BLC.shape
        adds = update_BLC is not None or frame_BTC is not None
        total = torch.empty_like(x_BLC) if adds else x_BLC
        out = torch.empty_like(x_BLC, dtype=FP8 if quantize else x_BLC.dtype)
        row_scale = x_BLC.new_empty(batch, tokens, 1, dtype=torch.float32) if quantize else scale
        frames = 1 if frame_BTC is None else frame_BTC.shape[1]
        block = triton.next_power_of_2(width)
        _norm_kernel[(batch * tokens,)](
            x_BLC.contiguous(),
            x_BLC if update_BLC is None else update_BLC.contiguous(),
            scale if gate is None else gate,
            scale if frame_BTC is None else frame_BTC.contiguous(),
            scale,
            shift,
            total,
            out,
            row_scale,
            width,
            tokens,
            tokens // frames,
            0 if gate is None else _batch_step(gate, width),
            _batch_step(scale, width),
            eps,
            HAS_UPDATE=update_BLC is not None,
            HAS_GATE=gate is not None,
            HAS_FRAME=frame_BTC is not None,
            QUANTIZE=quantize,
            FP8_LIMIT=FP8_MAX,
            BLOCK=block,
            num_warps=self._warps(block),
        )
        return total, QuantRows(out, row_scale) if quantize else out

    def add_gated(self, x_BLC: Tensor, update_BLC: Tensor, gate: Tensor) -> Tensor:
        batch, tokens, width = x_BLC.shape
        out = torch.empty_like(x_BLC)
        block = triton.next_power_of_2(width)
        _add_gated_kernel[(batch * tokens,)](
            x_BLC.contiguous(),
            update_BLC.contiguous(),
            gate,
            out,
            width,
            tokens,
            _batch_step(gate, width),
            BLOCK=block,
            num_warps=self._warps(block),
        )
        return out

    def rms(self, x_BLC: Tensor, weight: Tensor, eps: float) -> Tensor:
        batch, tokens, width = x_BLC.shape
        out = torch.empty(x_BLC.shape, dtype=x_BLC.dtype, device=x_BLC.device)
        block = triton.next_power_of_2(width)
        _rms_kernel[(batch * tokens,)](
            _packed_rows(x_BLC),
            weight,
            out,
            width,
            x_BLC.stride(1),
            x_BLC.stride(0),
            tokens,
            eps,
            BLOCK=block,
            num_warps=self._warps(block),
        )
        return out

    def rms_rotate(
        self,
        x_BLC: Tensor,
        weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        dtype: torch.dtype,
    ) -> Tensor:
        batch, tokens, width = x_BLC.shape
        head_dim = width // heads
        out = torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device=x_BLC.device)
        _rms_rotate_kernel[(batch * tokens,)](
            _packed_rows(x_BLC),
            weight,
            cos,
            sin,
            out,
            heads,
            x_BLC.stride(1),
            x_BLC.stride(0),
            tokens,
            eps,
            HEAD_DIM=head_dim,
            CLAMP=dtype == FP8,
            FP8_LIMIT=FP8_MAX,
            HEADS=triton.next_power_of_2(heads),
            num_warps=self._warps(triton.next_power_of_2(heads) * head_dim),
        )
        return out

    def quantize(self, x_BLC: Tensor, *, gelu: bool = False) -> QuantRows:
        x = x_BLC.contiguous()
        width = x.shape[-1]
        out = torch.empty_like(x, dtype=FP8)
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        _quantize_kernel[(scale.numel(),)](
            x, out, scale, width, GELU=gelu, FP8_LIMIT=FP8_MAX, BLOCK=block, num_warps=self._warps(block)
        )
        return QuantRows(out, scale)

    def quantize_heads(self, x_BLHD: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, head_dim = x_BLHD.shape
        scales = head_scales(x_BLHD)
        out = torch.empty(x_BLHD.shape, dtype=FP8, device=x_BLHD.device)
        block = triton.next_power_of_2(heads * head_dim)
        _quantize_heads_kernel[(batch * tokens,)](
            _packed_rows(x_BLHD.flatten(2)),
            scales,
            out,
            heads * head_dim,
            x_BLHD.stride(1),
            x_BLHD.stride(0),
            tokens,
            heads,
            HEAD_DIM=head_dim,
            FP8_LIMIT=FP8_MAX,
            BLOCK=block,
            num_warps=self._warps(block),
        )
        return out, scales


def _batch_step(vector: Tensor, width: int) -> int:
    """How far apart the rows of two batch entries lie: a (C,) vector serves all."""
    if vector.dtype != torch.float32 or vector.shape[-1] != width or not vector.is_contiguous():
        raise ValueError(
            f"row vectors are contiguous float32 of width {width}, not {vector.dtype} {vector.shape}"
        )
    return width if vector.ndim == 3 and vector.shape[0] > 1 else 0


def _packed_rows(x: Tensor) -> Tensor:
    if x.stride(-1) != 1:
        raise ValueError("the channels of a row must lie side by side")
    return x
