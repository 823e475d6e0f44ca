"""Block-sparse attention in float8 for Hopper GPUs, written in Gluon (Triton's explicit form).

A program owns 128 queries of a head. One warp fetches the listed blocks of keys and values through the tensor
memory accelerator into a ring of shared memory; two warp groups of 64 queries each multiply and take the
softmax. As in FlashAttention-3 (arXiv 2407.08608) the softmax of a block runs while the product of the block
before it with its values does. Four things are particular to float8:
- The tensor cores add up float8 products with 14 bits or so and cut off the rest, which over 30,000 keys
  loses a fifth of the result. So a block's product starts from zero and is added in float32 (as in
  SageAttention2, arXiv 2411.10958), in the time of the rescaling that is due anyway.
- Values lie transposed in memory, as the tensor cores want them, and within every 16 keys in the order in
  which a thread holds its scores (`transpose_kernel`), so that no weight changes its thread between products.
- Four weights travel from one turn of the loop to the next packed in an int32: single bytes would be taken
  apart and put together again at every turn.
- Weights are scaled by 2**8, which uses float8's range; the row sums are scaled alike.
Before a loop, give each variable a separate value: two names of one value become one variable in it (3.6).

Shapes: L tokens, H heads, 128 channels a head, blocks of 128 tokens.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK = gl.constexpr(128)
WIDTH = gl.constexpr(128)
HALF_ROWS = gl.constexpr(64)
NOTHING = gl.constexpr(-1e30)
OFFSET = gl.constexpr(8.0)


@triton.jit
def transpose_kernel(
    v_ptr, scale_ptr, out_ptr, tokens, row_step, padded, head_dim: tl.constexpr, LIMIT: tl.constexpr
):
    """One block of one head: v / scale in float8 as (channels, keys), zeros beyond the last token."""
    first = tl.program_id(0) * 128
    head = tl.program_id(1)
    place = tl.arange(0, 128)
    key = first + (place // 16) * 16 + (place // 2 % 2) * 8 + (place // 4 % 4) * 2 + place % 2
    channel = tl.arange(0, head_dim)
    start = v_ptr + head * head_dim
    v = tl.load(
        start + key.to(tl.int64)[:, None] * row_step + channel[None, :],
        mask=(key < tokens)[:, None],
        other=0.0,
    ).to(tl.float32)
    v = tl.clamp(v / tl.load(scale_ptr + head), -LIMIT, LIMIT).to(out_ptr.dtype.element_ty)
    line = (head * head_dim + channel).to(tl.int64) * padded
    tl.store(out_ptr + line[None, :] + (first + place)[:, None], v)


@gluon.jit
def _fetch(descriptors, ring, row, column, list_ptr, count):
    """The fetching warp: the queries, then the listed blocks.

    A place of the ring holds the keys of one block and the values of the block before it, which are used, and
    given back, together.
    """
    q_desc, k_desc, v_desc = descriptors
    q_s, k_s, v_s, ready, k_full, v_full, empty = ring
    STAGES: gl.constexpr = k_s.shape[0]
    mbarrier.expect(ready, BLOCK * WIDTH)
    tma.async_copy_global_to_shared(q_desc, [row, column], ready, q_s)
    block = gl.load(list_ptr)
    before = gl.to_tensor(0)
    for turn in range(count + 1):
        slot = turn % STAGES
        following = gl.load(list_ptr + gl.minimum(turn + 1, count - 1))
        mbarrier.wait(empty.index(slot), (turn // STAGES) & 1 ^ 1)
        keys = turn < count
        mbarrier.expect(k_full.index(slot), BLOCK * WIDTH, pred=keys)
        tma.async_copy_global_to_shared(
            k_desc, [block * BLOCK, column], k_full.index(slot), k_s.index(slot), pred=keys
        )
        values = turn > 0
        mbarrier.expect(v_full.index(slot), BLOCK * WIDTH, pred=values)
        tma.async_copy_global_to_shared(
            v_desc, [column, before * BLOCK], v_full.index(slot), v_s.index(slot), pred=values
        )
        before = block
        block = following


@gluon.jit
def _softmax(s, top, scale):
    """Weights of a block, the new maximum, and what older sums are to be multiplied with."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - (new_top - OFFSET)[:, None])
    return p, new_top, gl.exp2(top - new_top)


@gluon.jit
def _sums(p):
    """The four sums of a row that lie in one thread each; the threads' sums are added once, at the end."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], 16, 4, 2]), 3), 1)


@gluon.jit
def _beside(factor, total):
    """A value a row beside the four sums of the row."""
    LINES: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    return gl.convert_layout(factor, LINES, assert_trivial=True)[:, None]


@gluon.jit
def _pack(p, OPERAND: gl.constexpr):
    """Weights in the order of the tensor cores' left operand as float8, four of a row in one int32."""
    ROWS: gl.constexpr = p.shape[0]
    p = p.reshape([ROWS, 8, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, 128])
    p = gl.convert_layout(p, OPERAND, assert_trivial=True)
    p8 = gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [p],
        gl.int8,
        is_pure=True,
        pack=4,
    )
    even, odd = gl.split(p8.reshape([ROWS, 32, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return _byte(first, 0) | _byte(second, 8) | _byte(third, 16) | _byte(fourth, 24)


@gluon.jit
def _byte(x, place: gl.constexpr):
    return x.to(gl.uint8, bitcast=True).to(gl.int32) << place


@gluon.jit
def _unpack(packed, OPERAND: gl.constexpr):
    """The operand that `_pack` packed."""
    ROWS: gl.constexpr = packed.shape[0]
    even = gl.join(packed.to(gl.int8), (packed >> 16).to(gl.int8))
    odd = gl.join((packed >> 8).to(gl.int8), (packed >> 24).to(gl.int8))
    p8 = gl.join(even, odd).reshape([ROWS, 128]).to(gl.float8e4nv, bitcast=True)
    return gl.convert_layout(p8, OPERAND, assert_trivial=True)


@gluon.jit
def _computed(total):
    """`total`, computed at this point of the program.

    A store that never happens, since sums are positive, depends on it. Without it ptxas moves the softmax
    behind the next wait for the tensor cores, and the two no longer run at the same time.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; .reg .u32 at; setp.lt.f32 never, $1, 0fC0000000; mov.u32 at, 0;"
        " @never st.shared.f32 [at], $1; mov.f32 $0, $1; }",
        "=f,f",
        [total],
        gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _attend(ring, task, HALF: gl.constexpr):
    """A warp group: 64 of the program's queries. The first listed block alone may reach beyond the tokens."""
    q_s, k_s, v_s, ready, k_full, v_full, empty = ring
    out_ptr, v_scale, row, tokens, first, count, out_step, scale = task
    STAGES: gl.constexpr = k_s.shape[0]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32]
    )
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    LINES: gl.constexpr = gl.SliceLayout(1, MMA)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, MMA)
    q = q_s.slice(HALF * HALF_ROWS, HALF_ROWS)
    zeros = gl.zeros([HALF_ROWS, BLOCK], gl.float32, MMA)
    acc = gl.zeros([HALF_ROWS, WIDTH], gl.float32, MMA)
    top = gl.full([HALF_ROWS], NOTHING, gl.float32, LINES)

    mbarrier.wait(ready, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0))
    key = first * BLOCK + gl.arange(0, BLOCK, COLUMNS)
    s = gl.where((key < tokens)[None, :], s, NOTHING)
    p, top, factor = _softmax(s, top, scale)
    total = _sums(p)
    packed = _pack(p, OPERAND)
    part = gl.zeros([HALF_ROWS, WIDTH], gl.float32, MMA)
    older = gl.full([HALF_ROWS], 1.0, gl.float32, LINES)
    for turn in range(1, count):
        slot = turn % STAGES
        mbarrier.wait(k_full.index(slot), (turn // STAGES) & 1)
        s_going = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        acc = acc * older[:, None] + part
        # place 0 holds no values at first, so its phases of values are one behind
        mbarrier.wait(v_full.index(slot), ((turn - (slot == 0).to(gl.int32)) // STAGES) & 1)
        going = warpgroup_mma(
            _unpack(packed, OPERAND), v_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(1, deps=[s_going])
        older = factor
        p, top, factor = _softmax(s, top, scale)
        total = total * _beside(factor, total) + _sums(p)
        packed = _pack(p, OPERAND)
        total = _computed(total)
        part = warpgroup_mma_wait(0, deps=[going])
        mbarrier.arrive(empty.index(slot))
    acc = acc * older[:, None] + part
    slot = count % STAGES
    mbarrier.wait(v_full.index(slot), ((count - (slot == 0).to(gl.int32)) // STAGES) & 1)
    part = warpgroup_mma(
        _unpack(packed, OPERAND), v_s.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True
    )
    part = warpgroup_mma_wait(0, deps=[part])
    acc = acc * factor[:, None] + part
    acc = acc * (v_scale / gl.convert_layout(gl.sum(total, 1), LINES))[:, None]
    line = row + HALF * HALF_ROWS + gl.arange(0, HALF_ROWS, LINES)
    place = line.to(gl.int64)[:, None] * out_step + gl.arange(0, WIDTH, COLUMNS)[None, :]
    gl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=(line < tokens)[:, None])


@gluon.jit
def sparse_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    v_scale_ptr,
    counts_ptr,
    lists_ptr,
    tokens,
    blocks,
    longest,
    heads,
    scale,
    STAGES: gl.constexpr,
):
    """Program i: block i % blocks of the queries of head i // blocks. scale: of the scores, times log2(e).

    q_desc, k_desc: (L, H*128) float8. v_desc: (H*128, L padded to blocks) float8, by `transpose_kernel`.
    """
    line = gl.program_id(0)
    head = line // blocks
    row = (line % blocks) * BLOCK
    column = head * WIDTH
    count = gl.load(counts_ptr + line)
    list_ptr = lists_ptr + line.to(gl.int64) * longest
    first = gl.load(list_ptr)
    v_scale = gl.load(v_scale_ptr + head)
    out_step = heads * WIDTH
    q_s = gl.allocate_shared_memory(gl.float8e4nv, [BLOCK, WIDTH], q_desc.layout)
    k_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK, WIDTH], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, WIDTH, BLOCK], v_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    ring = (q_s, k_s, v_s, ready, k_full, v_full, empty)
    task = (out_ptr + column, v_scale, row, tokens, first, count, out_step, scale)
    gl.warp_specialize(
        [
            (_attend, (ring, task, gl.constexpr(0))),
            (_attend, (ring, task, gl.constexpr(1))),
            (_fetch, ((q_desc, k_desc, v_desc), ring, row, column, list_ptr, count)),
        ],
        [4, 1],
        [240, 24],
    )
