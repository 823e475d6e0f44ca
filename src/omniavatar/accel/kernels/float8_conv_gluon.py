"""The kernel of `float8_conv_cuda.convolve` for Hopper GPUs, written in Gluon (Triton's explicit form).

An implicit matrix product: rows are pixels, columns are output channels, and the inner axis runs over taps
and input channels. What bounds it is the way from the L2 cache to shared memory. So a program computes `TT`
frames of 8x16 pixels at once: a tile of pixels that was fetched serves up to three of them. One warp fetches
tiles and weights through the tensor memory accelerator into a ring of shared memory. Pixels beyond the
picture are zeros by its rule for coordinates out of range. Two warp groups of 64 pixels each multiply.
Three things are particular:
- 96 and 192 output channels are two accumulators (64 + 32, 128 + 64), since shapes are powers of two. So a
  program holds all channels of its pixels, and the norm of the next layer is taken in registers.
- A thread's columns of an accumulator are two of every eight. The rows of the weights are in such an order
  (`float8_conv.kernel_rows`) that they are neighbouring channels, read and written 16 bytes at a time.
- A program goes on to further tiles: the next tile is fetched while the last one is normed and written.
The file needs triton: import it only for CUDA.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HIGH = gl.constexpr(8)
WIDE = gl.constexpr(16)
PIXELS = gl.constexpr(128)
HALF_PIXELS = gl.constexpr(64)
RESIDUAL, TOTAL, NORM = gl.constexpr(1), gl.constexpr(2), gl.constexpr(4)


@gluon.jit
def _tile(number, shape, blocks, TT: gl.constexpr):
    """Block of channels, first frame, row and column of a tile."""
    _, height, width, _ = shape
    columns = gl.cdiv(width, WIDE)
    rows = gl.cdiv(height, HIGH)
    rest = number // blocks
    above = rest // columns
    return number % blocks, (above // rows) * TT, (above % rows) * HIGH, (rest % columns) * WIDE


@gluon.jit
def _fetch(
    descriptors,
    ring,
    task,
    top,
    side,
    steps,
    TT: gl.constexpr,
    TAPS: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
):
    """The fetching warp. A place of the ring holds TT + 2 frames of a tap, and its weights at three times."""
    x_desc, a_desc, b_desc = descriptors
    x_s, a_s, b_s, full, empty = ring
    shape, blocks, tiles = task
    STAGES: gl.constexpr = full.shape[0]
    BK: gl.constexpr = x_s.shape[2]
    turn = gl.to_tensor(0)
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, t, h, w = _tile(number, shape, blocks, TT)
        for step in range(3 * TAPS * steps):
            slot = turn % STAGES
            tap = step // steps
            k = (step % steps) * BK
            mbarrier.wait(empty.index(slot), (turn // STAGES) & 1 ^ 1)
            mbarrier.expect(full.index(slot), ((TT + 2) * PIXELS + 3 * (NA + NB)) * BK)
            for j in gl.static_range(TT + 2):
                tma.async_copy_global_to_shared(
                    x_desc,
                    [t + j, h + tap // TAPS - top, w + tap % TAPS - side, k],
                    full.index(slot),
                    x_s.index(slot * (TT + 2) + j)._reinterpret(
                        gl.float8e4nv, [1, HIGH, WIDE, BK], x_desc.layout
                    ),
                )
            for d in gl.static_range(3):
                row = (d * 3 * TAPS + tap) * shape[3] + block * (NA + NB)
                tma.async_copy_global_to_shared(a_desc, [row, k], full.index(slot), a_s.index(slot * 3 + d))
                if NB > 0:
                    tma.async_copy_global_to_shared(
                        b_desc, [row + NA, k], full.index(slot), b_s.index(slot * 3 + d)
                    )
            turn += 1


@gluon.jit
def _pixels(place, shape, HALF: gl.constexpr, LINES: gl.constexpr):
    """Row and column of the warp group's pixels, and which of them are in the picture."""
    frames, height, width, _ = shape
    t, h, w = place
    line = HALF * HALF_PIXELS + gl.arange(0, HALF_PIXELS, gl.SliceLayout(1, LINES))
    y = h + line // WIDE
    x = w + line % WIDE
    return y, x, (y < height) & (x < width) & (t < frames)


@gluon.jit
def _summed(acc, place, first, shape, sums, parts, HALF: gl.constexpr, LINES: gl.constexpr):
    """Scale, bias and residual; the sum is written to `total`."""
    _, height, width, channels = shape
    scale_ptr, bias_ptr, residual_ptr, total_ptr = sums
    N: gl.constexpr = acc.shape[1]
    acc = acc.reshape([HALF_PIXELS, N // 8, 4, 2]).permute([0, 2, 1, 3]).reshape([HALF_PIXELS, N])
    acc = gl.convert_layout(acc, LINES, assert_trivial=True)
    channel = first + gl.arange(0, N, gl.SliceLayout(0, LINES))
    y, x, inside = _pixels(place, shape, HALF, LINES)
    where = ((place[0] * height + y) * width + x).to(gl.int64)[:, None] * channels + channel[None, :]
    acc = acc * gl.load(scale_ptr + channel)[None, :] + gl.load(bias_ptr + channel)[None, :]
    if parts & RESIDUAL:
        acc += gl.load(residual_ptr + where, mask=inside[:, None], other=0.0).to(gl.float32)
    if parts & TOTAL:
        gl.store(total_ptr + where, acc.to(total_ptr.dtype.element_ty), mask=inside[:, None])
    return acc


@gluon.jit
def _normed(acc, factor, place, first, shape, after, HALF: gl.constexpr, LINES: gl.constexpr):
    """Norm and SiLU of the sum, in float8, to `out`."""
    gamma_ptr, out_ptr, frame_step, row_step, gain = after
    channel = first + gl.arange(0, acc.shape[1], gl.SliceLayout(0, LINES))
    y, x, inside = _pixels(place, shape, HALF, LINES)
    factor = gl.convert_layout(factor, gl.SliceLayout(1, LINES))
    normed = acc * factor[:, None] * gl.load(gamma_ptr + channel)[None, :]
    normed = normed / (1.0 + gl.exp(-normed)) * gain
    where = place[0].to(gl.int64) * frame_step + (y * row_step + x * shape[3])
    gl.store(out_ptr + where[:, None] + channel[None, :], normed.to(gl.float8e4nv), mask=inside[:, None])


@gluon.jit
def _multiply(
    ring,
    task,
    sums,
    after,
    parts,
    turns,
    TT: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    LINES_A: gl.constexpr,
    LINES_B: gl.constexpr,
    HALF: gl.constexpr,
):
    """A warp group: half of each tile's pixels, all frames and channels of it."""
    x_s, a_s, b_s, full, empty = ring
    shape, blocks, tiles = task
    STAGES: gl.constexpr = full.shape[0]
    MMA_A: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NA, 32]
    )
    MMA_B: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NB if NB > 0 else 8, 32]
    )
    ISSUED: gl.constexpr = 3 * TT * (2 if NB > 0 else 1)
    ROOT: gl.constexpr = (NA + NB) ** 0.5
    turn = gl.to_tensor(0)
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, t, h, w = _tile(number, shape, blocks, TT)
        accs = ()
        for _j in gl.static_range(TT):
            accs = accs + (gl.zeros([HALF_PIXELS, NA], gl.float32, MMA_A),)  # noqa: RUF005
        if NB > 0:
            for _j in gl.static_range(TT):
                accs = accs + (gl.zeros([HALF_PIXELS, NB], gl.float32, MMA_B),)  # noqa: RUF005
        for step in range(turns):
            slot = turn % STAGES
            mbarrier.wait(full.index(slot), (turn // STAGES) & 1)
            for d in gl.static_range(3):
                going = ()
                for j in gl.static_range(TT):
                    x = x_s.index(slot * (TT + 2) + j + d).slice(HALF * HALF_PIXELS, HALF_PIXELS)
                    weights = a_s.index(slot * 3 + d).permute((1, 0))
                    going = going + (warpgroup_mma(x, weights, accs[j], is_async=True),)  # noqa: RUF005
                if NB > 0:
                    for j in gl.static_range(TT):
                        x = x_s.index(slot * (TT + 2) + j + d).slice(HALF * HALF_PIXELS, HALF_PIXELS)
                        weights = b_s.index(slot * 3 + d).permute((1, 0))
                        going = going + (warpgroup_mma(x, weights, accs[TT + j], is_async=True),)  # noqa: RUF005
                accs = going
            accs = warpgroup_mma_wait(ISSUED, deps=accs)
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=step > 0)
            turn += 1
        accs = warpgroup_mma_wait(0, deps=accs)
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
        first = block * (NA + NB)
        for j in gl.static_range(TT):
            place = (t + j, h, w)
            v = _summed(accs[j], place, first, shape, sums, parts, HALF, LINES_A)
            squares = gl.sum(v * v, 1)
            if NB > 0:
                u = _summed(accs[TT + j], place, first + NA, shape, sums, parts, HALF, LINES_B)
                squares += gl.convert_layout(gl.sum(u * u, 1), gl.SliceLayout(1, LINES_A))
            if parts & NORM:
                factor = ROOT / gl.maximum(gl.sqrt(squares), 1e-12)
                _normed(v, factor, place, first, shape, after, HALF, LINES_A)
                if NB > 0:
                    _normed(u, factor, place, first + NA, shape, after, HALF, LINES_B)


@gluon.jit(
    do_not_specialize=["frames", "height", "width", "blocks", "tiles", "top", "side", "parts", "steps"]
)
def conv_kernel(
    x_desc,
    a_desc,
    b_desc,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    total_ptr,
    gamma_ptr,
    out_ptr,
    frames,
    height,
    width,
    channels,
    blocks,
    tiles,
    top,
    side,
    frame_step,
    row_step,
    gain,
    parts,
    steps,
    TT: gl.constexpr,
    TAPS: gl.constexpr,
    NA: gl.constexpr,
    NB: gl.constexpr,
    LINES_A: gl.constexpr,
    LINES_B: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Program i: tiles i, i + programs, and so on.

    - x_desc: the window, (T + 2, rows, columns, C), or 3C with one tap a row. a_desc, b_desc: the weights.
    - blocks: of NA + NB output channels. top, side: rows and columns of zeros that the window lacks.
    - frame_step, row_step: of `out`, in numbers. TAPS: 3, or 1 where a row's taps are one run.
    - parts: which of residual, total and norm are given; the other pointers are not used. So one compiled
      kernel serves all of them. steps: parts of the inner axis.
    """
    BK: gl.constexpr = a_desc.block_type.shape[1]
    HAS_B: gl.constexpr = NB > 0
    x_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * (TT + 2), PIXELS, BK], a_desc.layout)
    a_s = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 3, NA, BK], a_desc.layout)
    b_s = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES * 3 if HAS_B else 1, NB if HAS_B else 8, BK], a_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    fence_async_shared()
    ring = (x_s, a_s, b_s, full, empty)
    task = ((frames, height, width, channels), blocks, tiles)
    sums = (scale_ptr, bias_ptr, residual_ptr, total_ptr)
    after = (gamma_ptr, out_ptr, frame_step, row_step, gain)
    turns = TAPS * 3 * steps
    gl.warp_specialize(
        [
            (
                _multiply,
                (ring, task, sums, after, parts, turns, TT, NA, NB, LINES_A, LINES_B, gl.constexpr(0)),
            ),
            (
                _multiply,
                (ring, task, sums, after, parts, turns, TT, NA, NB, LINES_A, LINES_B, gl.constexpr(1)),
            ),
            (_fetch, ((x_desc, a_desc, b_desc), ring, task, top, side, steps, TT, TAPS, NA, NB)),
        ],
        [4, 1],
        [240, 24],
    )
