"""The kernels of block-sparse attention against the eager twin. Skipped without CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.attention.sparse import (
    BlockLists,
    block_mass,
    create_fa4_sparse,
    eager_sparse_attention,
)
from omniavatar.accel.attention.sparse_registry import SPARSE
from omniavatar.accel.graphs import FORWARDS_FIRST, CudaCapture, GraphedBlocks
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.kernels.rows import FP8
from omniavatar.accel.sparse_blocks import OrderedBlocks, SparseBlocks
from omniavatar.accel.sparse_steps import SparseSteps
from omniavatar.checkpoint.dit import random_dit
from omniavatar.model.dit import DiTConfig
from omniavatar.sampling.sparsity import PlanShape, calibrated_plan, nearest_blocks
from omniavatar.sampling.token_order import tile_order

pytestmark = pytest.mark.gpu
DEVICE, BLOCK = torch.device("cuda"), 128
SIZES = [(1, 128, 3, 1.0), (2, 1000, 3, 0.4), (1, 4135, 2, 0.3), (1, 39, 1, 1.0)]


def relative_l2(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def inputs(batch, tokens, heads):
    """q, k, v bf16; v is a strided view, as it is out of one product for all three."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    packed = torch.randn(batch, tokens, 3 * heads * 128, generator=generator, device=DEVICE) + 0.5
    q, k, v = (each.unflatten(-1, (heads, 128)) for each in packed.bfloat16().chunk(3, -1))
    return q.contiguous(), k.contiguous(), v


def random_lists(tokens, heads, share):
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator(DEVICE).manual_seed(0)
    kept = torch.rand(heads, blocks, blocks, generator=generator, device=DEVICE) < share
    return BlockLists.of(kept | torch.eye(blocks, dtype=torch.bool, device=DEVICE), BLOCK, tokens)


def float8_attention():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the float8 kernel is for Hopper GPUs")
    from omniavatar.accel.attention.sparse_float8 import Float8SparseAttention

    return Float8SparseAttention()


@pytest.mark.parametrize(("batch", "tokens", "heads", "share"), SIZES)
def test_float8_kernel(batch, tokens, heads, share):
    attention = float8_attention()
    q, k, v = inputs(batch, tokens, heads)
    lists = random_lists(tokens, heads, share)
    q8, k8 = q.to(FP8), k.to(FP8)
    expected = eager_sparse_attention(q8.float(), k8.float(), v.float(), lists)
    out = attention(q8, k8, v, lists)
    assert out.shape == v.shape and out.dtype == v.dtype
    assert relative_l2(out, expected) < 2e-2
    assert torch.equal(out, attention(q, k, v, lists))


def test_float8_sums_stay_exact_over_many_keys():
    """Sums that are left in the tensor cores lose a fifth at this length (FlashAttention-3: 0.2)."""
    attention = float8_attention()
    q, k, v = inputs(1, 30375, 1)
    lists = random_lists(30375, 1, 1.0)
    expected = eager_sparse_attention(q.float(), k.float(), v.float(), lists)
    assert relative_l2(attention(q, k, v, lists), expected) < 8e-3


def test_float8_kernel_writes_nothing_else():
    attention = float8_attention()
    q, k, v = inputs(1, 1000, 2)
    lists = random_lists(1000, 2, 0.5)
    expected = attention(q, k, v, lists)
    out = torch.full((1, 1300, 2, 128), 7.0, device=DEVICE, dtype=torch.bfloat16)
    attention.attend(q[0].to(FP8), k[0].to(FP8), v[0], out[0, 100:1100], lists)
    assert torch.equal(out[:, 100:1100], expected)
    assert (out[:, :100] == 7).all() and (out[:, 1100:] == 7).all()


def test_float8_kernel_refuses_other_sizes():
    attention = float8_attention()
    q, k, v = inputs(1, 256, 1)
    lists = BlockLists.of(torch.ones(1, 4, 4, dtype=torch.bool, device=DEVICE), 64, 256)
    with pytest.raises(ValueError, match="blocks of 128 tokens"):
        attention(q, k, v, lists)


@pytest.mark.parametrize(("batch", "tokens", "heads", "share"), SIZES)
def test_flash_attn_4(batch, tokens, heads, share):
    pytest.importorskip("flash_attn.cute")
    q, k, v = inputs(batch, tokens, heads)
    lists = random_lists(tokens, heads, share)
    expected = eager_sparse_attention(q.float(), k.float(), v.float(), lists)
    assert relative_l2(create_fa4_sparse()(q, k, v, lists), expected) < 5e-3


def by_name(name):
    if (reason := SPARSE.get(name).unavailable(DEVICE)) is not None:
        pytest.skip(reason)
    return SPARSE.get(name).create(DEVICE)


@pytest.mark.parametrize(("tokens", "heads", "share"), [(1000, 3, 0.4), (4135, 2, 0.3), (1024, 1, 1.0)])
def test_flex_attention(tokens, heads, share):
    q, k, v = inputs(1, tokens, heads)
    lists = random_lists(tokens, heads, share)
    expected = eager_sparse_attention(q.float(), k.float(), v.float(), lists)
    assert relative_l2(by_name("flex")(q, k, v, lists), expected) < 5e-3


def test_block_mass_is_the_same_at_every_call_and_on_the_cpu():
    q, k, _ = inputs(1, 1000, 3)
    mass = block_mass(q, k, BLOCK)
    assert torch.equal(mass, block_mass(q, k, BLOCK))
    assert torch.allclose(block_mass(q.cpu(), k.cpu(), BLOCK), mass.cpu(), atol=1e-5)


@pytest.mark.parametrize("name", ["fa4", "float8", "flex"])
@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_steps_by_plan_as_cuda_graphs(name, quantize):
    """Graphs of sparse steps replay the same bits, and agree with the twin."""
    attention = by_name(name)
    config = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, audio_dim=64)
    dense = create_attention("cudnn", DEVICE, torch.bfloat16)[1]
    dit = random_dit(config, attention=dense, dtype=torch.bfloat16, device=DEVICE, seed=0)
    apply_accelerations(dit, AccelConfig(quantize, True), create_fused(DEVICE))
    shape = PlanShape(3, 3, 2, (5, 20, 30), BLOCK)
    generator = np.random.default_rng(0)

    def mass(step, layer):
        return generator.dirichlet(np.full(shape.blocks, 0.3), (2, shape.blocks))

    plan = calibrated_plan(shape, mass, 0.8, [0])
    capture = CudaCapture()
    plain = SparseSteps(dit, plan, attention, dit.run_blocks, DEVICE)
    twin = SparseSteps(dit, plan, eager_sparse_attention, dit.run_blocks, DEVICE)
    graphed = SparseSteps(
        dit, plan, attention, dit.run_blocks, DEVICE, lambda run: GraphedBlocks(run, capture)
    )
    random = torch.Generator(DEVICE).manual_seed(1)

    def noise(*sizes):
        return torch.randn(sizes, generator=random, device=DEVICE)

    with torch.inference_mode():
        states = dit.prepare_text(noise(1, 40, 64)), dit.prepare_audio(noise(1, 17, 64))
        y, time = noise(1, 17, 5, 40, 60), torch.tensor([700.0], device=DEVICE)

        def forward(steps, step, sample):
            steps.step = step
            return dit(sample, y, time, *states, run_blocks=steps.ordered(steps, always=False))

        for _ in range(FORWARDS_FIRST + 2):
            sample = noise(1, 16, 5, 40, 60)
            for step in (0, 1, 2):
                out = forward(graphed, step, sample)
                assert torch.equal(out, forward(plain, step, sample))
        assert relative_l2(out, forward(twin, 2, sample)) < 3e-2
    assert torch.isfinite(out).all()


def test_blocks_by_plan_in_tile_order():
    """A small model with heads of 128 channels, by the kernel and by the twin."""
    attention = float8_attention()
    config = DiTConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64, audio_dim=64)
    dense = create_attention("sdpa", DEVICE, torch.bfloat16)[1]
    dit = random_dit(config, attention=dense, dtype=torch.bfloat16, device=DEVICE, seed=0)
    generator = torch.Generator(DEVICE).manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    grid = (5, 20, 30)
    sample, y = random(1, 16, 5, 40, 60), random(1, 17, 5, 40, 60)
    order = tile_order(grid)
    kept = torch.from_numpy(nearest_blocks(order, BLOCK, 0.4, 2.0)).to(DEVICE).expand(2, -1, -1)
    lists = [None, BlockLists.of(kept, BLOCK, 3000), BlockLists.of(kept, BLOCK, 3000)]
    with torch.inference_mode():
        states = dit.prepare_text(random(1, 40, 64)), dit.prepare_audio(random(1, 17, 64))
        outs = [
            dit(
                sample,
                y,
                torch.tensor([700.0], device=DEVICE),
                *states,
                run_blocks=OrderedBlocks(SparseBlocks.of(dit, each, lists), order, DEVICE),
            )
            for each in (attention, eager_sparse_attention)
        ]
    assert relative_l2(*outs) < 2e-2
