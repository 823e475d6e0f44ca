"""Triton kernels of `rows`: one program for each token row, everything in registers between load and store.

All are bound by memory: at 3 TB/s a pass over (30,375 x 5120) bf16 takes 0.10 ms. Triton's blocks are powers
of two, and a row of 5120 would waste 3/8 of 8192. So a row that is reduced is held in two parts, 4096 and
1024, the second one masked. Computed in float32 and rounded once, as in `rows.EagerOps`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _summed(
    x_ptr, update_ptr, gate_ptr, frame_ptr, sum_ptr, start, gate_start, frame_start, column, inside,
    HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FRAME: tl.constexpr,
):  # fmt: skip
    x = tl.load(x_ptr + start + column, inside, 0.0).to(tl.float32)
    if HAS_UPDATE:
        update = tl.load(update_ptr + start + column, inside, 0.0).to(tl.float32)
        if HAS_GATE:
            update = update * tl.load(gate_ptr + gate_start + column, inside, 0.0)
        x = x + update
    if HAS_FRAME:
        x = x + tl.load(frame_ptr + frame_start + column, inside, 0.0).to(tl.float32)
    if HAS_UPDATE or HAS_FRAME:
        stored = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + start + column, stored, inside)
        x = stored.to(tl.float32)
    return x


@triton.jit
def _stepped(x, inverse, WHOLE: tl.constexpr):
    x = x * inverse
    if WHOLE:
        x = tl.floor(x + 0.5)
    return x


@triton.jit
def _affine(x, scale_ptr, shift_ptr, column, inside):
    return x * tl.load(scale_ptr + column, inside, 0.0) + tl.load(shift_ptr + column, inside, 0.0)


@triton.jit
def norm_kernel(
    x_ptr, update_ptr, gate_ptr, frame_ptr, scale_ptr, shift_ptr, sum_ptr, out_ptr, out_scale_ptr,
    width, tokens, tokens_per_frame, gate_step, scale_step, eps,
    HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_FRAME: tl.constexpr, QUANTIZE: tl.constexpr,
    LIMIT: tl.constexpr, WHOLE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    start, gate_start, frame_start = row * width, batch * gate_step, row // tokens_per_frame * width
    first = tl.arange(0, MAIN)
    x = _summed(
        x_ptr, update_ptr, gate_ptr, frame_ptr, sum_ptr, start, gate_start, frame_start, first, first < width,
        HAS_UPDATE, HAS_GATE, HAS_FRAME,
    )  # fmt: skip
    total = tl.sum(x, 0)
    if REST:
        second = MAIN + tl.arange(0, REST)
        inside = second < width
        y = _summed(
            x_ptr, update_ptr, gate_ptr, frame_ptr, sum_ptr, start, gate_start, frame_start, second, inside,
            HAS_UPDATE, HAS_GATE, HAS_FRAME,
        )  # fmt: skip
        total += tl.sum(y, 0)
    mean = total / width
    x -= mean
    squares = tl.sum(x * x, 0)
    if REST:
        y = tl.where(inside, y - mean, 0.0)
        squares += tl.sum(y * y, 0)
    rstd = 1.0 / tl.sqrt(squares / width + eps)
    scale_ptr += batch * scale_step
    shift_ptr += batch * scale_step
    x = _affine(x * rstd, scale_ptr, shift_ptr, first, first < width)
    if REST:
        y = _affine(y * rstd, scale_ptr, shift_ptr, second, inside)
    if QUANTIZE:
        largest = tl.max(tl.abs(x), 0)
        if REST:
            largest = tl.maximum(largest, tl.max(tl.abs(y), 0))
        step = tl.maximum(largest / LIMIT, 1e-12)
        tl.store(out_scale_ptr + row, step)
        inverse = 1.0 / step
        x = _stepped(x, inverse, WHOLE)
        if REST:
            y = _stepped(y, inverse, WHOLE)
    tl.store(out_ptr + start + first, x.to(out_ptr.dtype.element_ty))
    if REST:
        tl.store(out_ptr + start + second, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def add_gated_kernel(
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
def rms_kernel(
    x_ptr, weight_ptr, out_ptr, width, row_step, batch_step, tokens, eps,
    MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = x_ptr + (row // tokens) * batch_step + (row % tokens) * row_step
    first = tl.arange(0, MAIN)
    x = tl.load(place + first).to(tl.float32)
    squares = tl.sum(x * x, 0)
    if REST:
        second = MAIN + tl.arange(0, REST)
        inside = second < width
        y = tl.load(place + second, inside, 0.0).to(tl.float32)
        squares += tl.sum(y * y, 0)
    rstd = 1.0 / tl.sqrt(squares / width + eps)
    out_ptr += row * width
    x = x * rstd * tl.load(weight_ptr + first).to(tl.float32)
    tl.store(out_ptr + first, x.to(out_ptr.dtype.element_ty))
    if REST:
        y = y * rstd * tl.load(weight_ptr + second, inside, 0.0).to(tl.float32)
        tl.store(out_ptr + second, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _rotated(
    x, cos, sin, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CLAMP: tl.constexpr, LIMIT: tl.constexpr
):
    even, odd = tl.split(tl.reshape(x, (HEADS, HEAD_DIM // 2, 2)))
    x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, HEAD_DIM))
    if CLAMP:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return x


@triton.jit
def rms_rotate_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, heads, row_step, batch_step, tokens, eps,
    HEAD_DIM: tl.constexpr, CLAMP: tl.constexpr, FP8_LIMIT: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row % tokens
    width = heads * HEAD_DIM
    place = x_ptr + (row // tokens) * batch_step + token * row_step
    within = tl.arange(0, HEAD_DIM)[None, :]
    first = tl.arange(0, MAIN)[:, None] * HEAD_DIM + within
    x = tl.load(place + first).to(tl.float32)
    squares = tl.sum(tl.sum(x * x, 1), 0)
    if REST:
        head = MAIN + tl.arange(0, REST)[:, None]
        second, inside = head * HEAD_DIM + within, head < heads
        y = tl.load(place + second, inside, 0.0).to(tl.float32)
        squares += tl.sum(tl.sum(y * y, 1), 0)
    rstd = 1.0 / tl.sqrt(squares / width + eps)
    table = token * (HEAD_DIM // 2) + tl.arange(0, HEAD_DIM // 2)
    cos, sin = tl.load(cos_ptr + table)[None, :], tl.load(sin_ptr + table)[None, :]
    out_ptr += row * width
    x = x * rstd * tl.load(weight_ptr + first).to(tl.float32)
    x = _rotated(x, cos, sin, MAIN, HEAD_DIM, CLAMP, FP8_LIMIT)
    tl.store(out_ptr + first, x.to(out_ptr.dtype.element_ty))
    if REST:
        y = y * rstd * tl.load(weight_ptr + second, inside, 0.0).to(tl.float32)
        y = _rotated(y, cos, sin, REST, HEAD_DIM, CLAMP, FP8_LIMIT)
        tl.store(out_ptr + second, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _activated(x_ptr, column, inside, GELU: tl.constexpr):
    x = tl.load(x_ptr + column, inside, 0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * inner)
    return x


@triton.jit
def quantize_kernel(
    x_ptr, out_ptr, out_scale_ptr, width, GELU: tl.constexpr, LIMIT: tl.constexpr, WHOLE: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * width
    out_ptr += row * width
    first = tl.arange(0, MAIN)
    x = _activated(x_ptr, first, first < width, GELU)
    largest = tl.max(tl.abs(x), 0)
    if REST:
        second = MAIN + tl.arange(0, REST)
        inside = second < width
        y = _activated(x_ptr, second, inside, GELU)
        largest = tl.maximum(largest, tl.max(tl.abs(y), 0))
    step = tl.maximum(largest / LIMIT, 1e-12)
    tl.store(out_scale_ptr + row, step)
    inverse = 1.0 / step
    tl.store(out_ptr + first, _stepped(x, inverse, WHOLE).to(out_ptr.dtype.element_ty))
    if REST:
        tl.store(out_ptr + second, _stepped(y, inverse, WHOLE).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def quantize_heads_kernel(
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


@triton.jit
def rescale_kernel(
    sum_ptr, row_scale_ptr, column_scale_ptr, bias_ptr, out_ptr, width,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(sum_ptr + row * width + column, inside, 0).to(tl.float32)
    x = x * tl.load(row_scale_ptr + row) * tl.load(column_scale_ptr + column, inside, 0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, x.to(out_ptr.dtype.element_ty), inside)
