"""Sparse attention step by step: backends by name, one forward by plan, graphs, streamed blocks."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from command_line import REPOSITORY
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.attention.sparse import BlockLists, eager_sparse_attention
from omniavatar.accel.attention.sparse_flex import FlexSparseAttention, block_mask
from omniavatar.accel.attention.sparse_registry import BREAK_EVEN, SIZES, SPARSE, break_even, choose_sparse
from omniavatar.accel.graphs import FORWARDS_FIRST, GraphedBlocks
from omniavatar.accel.mass_meter import MassMeter
from omniavatar.accel.offload import OffloadConfig, apply_offload
from omniavatar.accel.sparse_steps import SparseSteps, list_bytes
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.errors import NumbersError, ResourceError
from omniavatar.model.dit import WanDiT
from omniavatar.sampling.sparsity import (
    DENSE,
    PlanShape,
    SparsityPlan,
    calibrated_plan,
    dense_plan,
    window_plan,
)

CPU = torch.device("cpu")
GRID = (3, 4, 6)


def nano() -> WanDiT:
    _, attention = create_attention("sdpa", CPU, torch.float32)
    return random_dit(scale_spec("nano").dit, attention=attention, dtype=torch.float32, device="cpu", seed=0)


def shape_of(dit: WanDiT, steps: int = 3) -> PlanShape:
    return PlanShape(steps, dit.config.num_layers, dit.config.num_heads, GRID, 8)


def random_plan(shape: PlanShape, share: float = 0.6) -> SparsityPlan:
    """Every head of every layer and step has other blocks; the first step is dense."""
    generator = np.random.default_rng(0)

    def mass(step: int, layer: int) -> np.ndarray:
        return generator.dirichlet(np.full(shape.blocks, 0.4), (shape.heads, shape.blocks))

    return calibrated_plan(shape, mass, share, [0])


def forward(dit: WanDiT, run_blocks, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    with torch.inference_mode():
        text = dit.prepare_text(random(1, 12, dit.config.text_dim))
        audio = dit.prepare_audio(random(1, 9, dit.config.audio_dim))
        sample, y = random(1, 16, 3, 8, 12), random(1, 17, 3, 8, 12)
        return dit(sample, y, torch.tensor([700.0]), text, audio, run_blocks=run_blocks)


def steps_of(dit: WanDiT, plan: SparsityPlan, **more) -> SparseSteps:
    return SparseSteps(dit, plan, eager_sparse_attention, dit.run_blocks, CPU, **more)


def at(sparse: SparseSteps, step: int, always: bool = False):
    sparse.step = step
    return sparse.ordered(sparse, always)


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_dense_steps_are_dense_and_sparse_ones_follow_their_own_tables():
    dit = nano()
    plan = random_plan(shape_of(dit))
    sparse, plain = steps_of(dit, plan), forward(dit, None)
    assert torch.equal(forward(dit, at(sparse, 0)), plain), "nothing is reordered at a dense step"
    assert 0 < differs(forward(dit, at(sparse, 0, always=True)), plain) < 2e-6
    first, second = (forward(dit, at(sparse, step)) for step in (1, 2))
    assert differs(first, plain) > 1e-4 and differs(first, second) > 1e-4
    alone = steps_of(dit, plan.of_step(2))
    assert torch.equal(forward(dit, at(alone, 0)), second)


def test_a_plan_that_keeps_everything_equals_dense_attention():
    dit = nano()
    shape = shape_of(dit)
    plan = window_plan(shape, shape.order, 1.0, [0])
    assert plan.sparse_steps == (1, 2) and plan.kept_share == 1.0
    assert differs(forward(dit, at(steps_of(dit, plan), 1)), forward(dit, None)) < 2e-6


def test_equal_steps_share_their_lists_and_their_graph():
    dit = nano()
    shape = shape_of(dit, 4)
    wrapped = []

    def wrap(run):
        wrapped.append(run)
        return run

    steps_of(dit, window_plan(shape, shape.order, 0.4, [0]), wrap=wrap)
    assert len(wrapped) == 1
    steps_of(dit, random_plan(shape), wrap=wrap)
    assert len(wrapped) == 1 + 3


def test_the_bytes_of_lists_are_counted():
    dit = nano()
    shape = shape_of(dit)
    assert list_bytes(dense_plan(shape)) == 0
    window = window_plan(shape, shape.order, 0.4, [0])
    row = shape.heads * shape.blocks * 8
    assert list_bytes(window) == window.kept(1, 0).sum(-1).max() * row  # one table for all layers
    plan = random_plan(shape)
    listed = [plan.kept(step, layer).sum(-1).max() for step in (1, 2) for layer in range(shape.layers)]
    assert list_bytes(plan) == sum(listed) * row


def test_captured_forwards_follow_their_steps():
    """A capture that records what ran; its replay runs it again on the captured tensors."""
    dit = nano()
    captures = []

    def capture(work):
        captures.append(work)
        out = work()
        return (lambda: out.copy_(work())), out

    def wrap(run):
        return GraphedBlocks(run, capture)

    plan = random_plan(shape_of(dit))
    plain, graphed = steps_of(dit, plan), steps_of(dit, plan, wrap=wrap)
    for _ in range(FORWARDS_FIRST + 1):
        for step in (1, 2):
            assert torch.equal(forward(dit, at(graphed, step)), forward(dit, at(plain, step)))
    assert len(captures) == 2
    for seed in (2, 3):
        assert torch.equal(forward(dit, at(graphed, 1), seed), forward(dit, at(plain, 1), seed))
    assert len(captures) == 2, "other values of the same shapes are replayed"


def test_streamed_blocks_give_the_same_bits():
    dit = nano()
    plan = random_plan(shape_of(dit))
    expected = forward(dit, at(steps_of(dit, plan), 2))
    apply_offload(dit, OffloadConfig(1, 2), CPU)
    assert torch.equal(forward(dit, at(steps_of(dit, plan), 2)), expected)


def qkv(tokens: int, heads: int, width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, heads, width, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("tokens", [256, 300, 128])
def test_flex_attention_gets_the_kept_blocks(tokens):
    """Uncompiled, PyTorch applies the mask by token; the lists are compared with the table."""
    blocks = -(-tokens // 128)
    kept = torch.rand(2, blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.5
    kept |= torch.eye(blocks, dtype=torch.bool)
    lists = BlockLists.of(kept, 128, tokens)
    mask = block_mask(lists)
    assert torch.equal(mask.to_dense()[0].bool(), kept)
    assert mask.full_kv_num_blocks is not None
    assert torch.equal(mask.kv_num_blocks[0], kept[..., -1].int()), "only a row's last block is masked"
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = qkv(tokens, 2)
    out = FlexSparseAttention(flex_attention)(q, k, v, lists)
    assert differs(out, eager_sparse_attention(q, k, v, lists)) < 1e-5


HOPPER, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.mark.parametrize(
    ("attention", "block", "width", "dtype", "chosen"),
    [
        ("fa3_fp8", 128, 128, BF16, "float8"),
        ("fa3", 128, 128, BF16, "fa4"),
        ("cudnn", 128, 128, torch.float16, "fa4"),
        ("fa3", 256, 128, BF16, "flex"),
        ("fa3_fp8", 128, 64, BF16, "flex"),
        ("sdpa", 128, 128, torch.float32, "flex"),
    ],
)
def test_auto_takes_the_fastest_that_is_as_exact_as_dense_attention(
    hopper_records, attention, block, width, dtype, chosen
):
    assert choose_sparse("auto", HOPPER, dtype, attention, block, width).name == chosen


@pytest.fixture
def hopper_records():
    """The registry as it is on a Hopper GPU with every package."""

    def registered(backends) -> None:
        for each in list(SPARSE):
            SPARSE.unregister(each.name)
        for each in backends:
            SPARSE.register(each)

    before = list(SPARSE)
    registered([replace(each, unavailable=lambda device: None) for each in before])
    yield
    registered(before)


@pytest.mark.parametrize(
    ("name", "block", "width", "dtype", "line"),
    [
        ("auto", 16, 128, BF16, "sparse_attention: no fast backend takes blocks of 16 tokens"),
        ("fa4", 64, 128, BF16, "sparse_block_size: fa4 takes blocks of 128 tokens, not of 64; set"),
        ("float8", 256, 128, BF16, "sparse_block_size: float8 takes blocks of 128 tokens, not of 256"),
        ("fa4", 128, 64, BF16, "sparse_backend: fa4 takes heads of 128 channels, this model has 64"),
        ("fa4", 128, 128, torch.float32, "sparse_backend: fa4 computes in bf16 and fp16, not in fp32"),
        ("fast", 128, 128, BF16, "sparse_backend: 'fast' is not known; use one of: auto, eager"),
    ],
)
def test_what_a_backend_does_not_take_is_one_line(hopper_records, name, block, width, dtype, line):
    with pytest.raises(ResourceError) as error:
        choose_sparse(name, HOPPER, dtype, "fa3", block, width)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_cpu_has_the_twin_only():
    assert choose_sparse("auto", CPU, torch.float32, "sdpa", 16, 32).name == "eager"
    with pytest.raises(ResourceError, match=r"sparse_backend: fa4 cannot be used here \(it needs a Hopper"):
        choose_sparse("fa4", CPU, torch.float32, "sdpa", 128, 128)
    assert not SPARSE.get("eager").fast and break_even("eager", "sdpa", 12, 30375) == 1.0


def measured_forwards() -> dict[tuple[int, int, str, float], float]:
    """Milliseconds by heads, tokens, attention and share, as they were measured."""
    file = REPOSITORY / "benchmarks" / "results" / "2026-11-28_h100_sparse.jsonl"
    (found,) = (
        line["rows"] for line in map(json.loads, file.open()) if line["benchmark"] == "sparse forwards"
    )
    heads = {"14B": 40, "1.3B": 12}
    return {(heads[r["scale"]], r["tokens"], r["attention"], r["share"]): r["ms"] for r in found}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pair", BREAK_EVEN)
def test_the_break_even_of_a_size_is_the_measured_one(pair, size):
    """A forward with that share takes as long as a dense one, on a line through 35 and 100 % kept."""
    sparse, dense = pair
    times = measured_forwards()
    less, whole, other = (times[(*size, *at)] for at in ((sparse, 0.35), (sparse, 1.0), (dense, 1.0)))
    share = 0.35 + 0.65 * (other - less) / (whole - less)
    assert break_even(sparse, dense, *size) == pytest.approx(share, abs=0.006)


@pytest.mark.parametrize("size", SIZES)
def test_the_backend_that_auto_takes_beside_float8_attention_is_the_fastest_at_every_share(size):
    times = measured_forwards()
    for share in (0.25, 0.35, 1.0):
        assert times[(*size, "float8", share)] < times[(*size, "fa4", share)]


@pytest.mark.parametrize(
    ("heads", "tokens", "share"),
    [(40, 32760, 0.89), (40, 12000, 0.87), (12, 1000, 0.90), (16, 21000, 0.90), (40, 21000, 0.87)],
)
def test_another_size_takes_the_nearest_break_even(heads, tokens, share):
    assert break_even("float8", "fa3_fp8", heads, tokens) == share


def test_every_table_is_dense_where_a_layer_keeps_too_much():
    shape = PlanShape(2, 3, 1, (1, 8, 8), 16)
    plan = window_plan(shape, shape.order, 0.75, [0]).dense_above(0.7)
    assert (plan.table_of == DENSE).all() and plan.sparse_steps == () and plan.kept_share == 1.0


@pytest.mark.parametrize("spoil", [float("nan"), 0.0])
def test_masses_that_are_none_make_no_levels(spoil):
    dit = nano()
    meter = MassMeter(dit, shape_of(dit), 1, 1, CPU)
    sums = np.full_like(meter.sums, 0.5)
    meter.restore(sums)
    assert meter.levels().levels.shape == sums.shape
    sums[0, 2, 1, 3] = spoil
    with pytest.raises(NumbersError, match="block masses of a layer are not finite, or zero"):
        meter.levels()
