"""Sparse attention's eager twin, and the blocks by plan and in tile order (the kernels: tests/gpu)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.attention.sparse import (
    BlockLists,
    Fa4SparseAttention,
    block_mass,
    eager_sparse_attention,
)
from omniavatar.accel.fused_blocks import apply_fused_blocks
from omniavatar.accel.kernels.rows import EagerOps
from omniavatar.accel.sparse_blocks import OrderedAudio, OrderedBlocks, SparseBlocks
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.model.layers import TokenAudio
from omniavatar.sampling.sparsity import fewest_blocks, nearest_blocks
from omniavatar.sampling.token_order import row_order, tile_order

CPU = torch.device("cpu")


def qkv(batch, tokens, heads, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, width, generator=generator) * 2 for _ in range(3)]


def table(heads, tokens, block, share, seed=0):
    blocks = -(-tokens // block)
    kept = torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < share
    return kept | torch.eye(blocks, dtype=torch.bool)


def reference(q, k, v, kept, block):
    """In float64, one query at a time over the keys that it keeps."""
    out = torch.empty(v.shape, dtype=torch.float64)
    keys = torch.arange(k.shape[1]) // block
    for head in range(q.shape[2]):
        for query in range(q.shape[1]):
            listed = kept[head, query // block][keys]
            scores = q[:, query, head].double()[:, None] @ k[:, listed, head].double().mT
            weights = (scores / q.shape[-1] ** 0.5).softmax(-1)
            out[:, query, head] = (weights @ v[:, listed, head].double())[:, 0]
    return out


def rounding(q, k, v):
    """What attention may lose in the dtype of q: a rounded score s moves its weight by the share s * eps.

    The factor 2 is spare: 6,000 random examples lost at most 0.57 of the rest.
    """
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT / q.shape[-1] ** 0.5
    return 2 * torch.finfo(q.dtype).eps * (1 + scores.abs().max()) * v.abs().max()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 2),
    st.integers(1, 50),
    st.integers(1, 3),
    st.integers(1, 17),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.integers(0, 99),
)
def test_twin_equals_a_masked_reference(batch, tokens, heads, block, share, seed):
    kept = table(heads, tokens, block, share, seed)
    for dtype in (torch.float32, torch.float64):
        q, k, v = (each.to(dtype) for each in qkv(batch, tokens, heads, seed=seed))
        out = eager_sparse_attention(q, k, v, BlockLists.of(kept, block, tokens))
        assert out.shape == v.shape and out.dtype == dtype
        wrong = (out.double() - reference(q, k, v, kept, block)).abs().max()
        assert wrong <= rounding(q, k, v), dtype


def test_everything_kept_is_dense():
    q, k, v = qkv(2, 77, 3)
    dense = create_attention("sdpa", CPU, torch.float32)[1](q, k, v)
    out = eager_sparse_attention(q, k, v, BlockLists.of(table(3, 77, 16, 1.0), 16, 77))
    assert relative(out, dense) < 1e-6


def test_twin_in_parts_of_the_queries():
    q, k, v = qkv(1, 90, 2)
    lists = BlockLists.of(table(2, 90, 8, 0.4), 8, 90)
    whole = eager_sparse_attention(q, k, v, lists)
    parts = eager_sparse_attention(q, k, v, lists, mask_values=2 * 8 * 90 * 5)
    assert relative(parts, whole) < 1e-6


@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 20), st.floats(0, 1), st.integers(0, 99))
def test_lists_hold_the_table(heads, tokens, block, share, seed):
    kept = table(heads, tokens, block, share, seed)
    lists = BlockLists.of(kept, block, tokens)
    assert torch.equal(lists.kept(), kept)
    assert torch.equal(lists.heads(slice(0, 1)).kept(), kept[:1])
    for head, row in torch.cartesian_prod(torch.arange(heads), torch.arange(kept.shape[1])).tolist():
        listed = lists.indices[head, row, : lists.counts[head, row]].tolist()
        assert listed == sorted(listed, reverse=True)
        _, last, others, rest = (each[0, head, row].tolist() for each in lists.last_and_rest)
        assert [*last, *rest[:others]] == listed


def test_lists_refuse_empty_rows_and_other_sizes():
    kept = torch.ones(1, 4, 4, dtype=torch.bool)
    kept[0, 2] = False
    with pytest.raises(ValueError, match="must keep a block"):
        BlockLists.of(kept, 16, 64)
    with pytest.raises(ValueError, match="65 tokens in blocks of 16 are 5 blocks"):
        BlockLists.of(kept, 16, 65)
    lists = BlockLists.of(torch.ones(1, 4, 4, dtype=torch.bool), 16, 64)
    q, k, v = qkv(1, 64, 2)
    with pytest.raises(ValueError, match="do not fit"):
        eager_sparse_attention(q, k, v, lists)


def test_flash_attn_4_gets_the_last_block_by_itself():
    """What its kernel masks is the first list, so a block that reaches beyond the tokens must be there."""
    given = {}

    def forward(q, k, v, block_sparse_tensors):
        given["lists"] = block_sparse_tensors
        return v, None

    def tensors(counts, last, others, rest, block_size):
        return counts, last, others, rest, block_size

    tokens = 300
    kept = table(2, tokens, 128, 0.5)
    attention = Fa4SparseAttention(forward, tensors)
    q, k, v = qkv(1, tokens, 2)
    assert attention(q, k, v, BlockLists.of(kept, 128, tokens)) is v
    counts, last, others, rest, size = given["lists"]
    assert size == (128, 128) and counts.shape == (1, 2, 3) and counts.dtype == torch.int32
    assert all(each.is_contiguous() for each in (counts, last, others, rest))
    assert torch.equal(last[0, ..., 0] == 2, kept[..., 2])
    assert not any(2 in rest[0, h, r, : others[0, h, r]].tolist() for h in range(2) for r in range(3))
    with pytest.raises(ValueError, match="blocks of 128"):
        attention(q, k, v, BlockLists.of(table(2, tokens, 64, 0.5), 64, tokens))


def test_block_mass_is_the_softmax_summed():
    q, k, _ = qkv(2, 45, 3)
    mass = block_mass(q, k, 16)
    weights = ((q.transpose(1, 2) @ k.transpose(1, 2).mT) / 8**0.5).softmax(-1).mean(0)
    assert mass.shape == (3, 3, 3)
    assert torch.allclose(mass.sum(-1), torch.ones(3, 3), atol=1e-5)
    assert torch.allclose(mass[:, 1, 2], weights[:, 16:32, 32:].sum(-1).mean(-1), atol=1e-6)


def test_a_larger_share_of_the_mass_is_nearer_to_dense():
    q, k, v = qkv(1, 240, 2)
    mass = block_mass(q, k, 16).numpy()
    dense = create_attention("sdpa", CPU, torch.float32)[1](q, k, v)
    errors = []
    for share in (0.5, 0.9, 0.99):
        kept = torch.from_numpy(fewest_blocks(mass, share))
        out = eager_sparse_attention(q, k, v, BlockLists.of(kept, 16, 240))
        errors.append(((out - dense).norm() / dense.norm()).item())
    assert errors[0] > errors[1] > errors[2] > 0


GRID = (3, 4, 6)


def nano():
    _, attention = create_attention("sdpa", CPU, torch.float32)
    spec = scale_spec("nano").dit
    return random_dit(spec, attention=attention, dtype=torch.float32, device="cpu", seed=0)


def forward(dit, run_blocks=None, with_audio=True):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 16, 3, 8, 12, generator=generator)
    y = torch.randn(2, 17, 3, 8, 12, generator=generator)
    text = torch.randn(2, 20, dit.config.text_dim, generator=generator)
    audio = torch.randn(2, 9, dit.config.audio_dim, generator=generator) if with_audio else None
    with torch.inference_mode():
        states = dit.prepare_text(text), dit.prepare_audio(audio)
        return dit(sample, y, torch.tensor([700.0, 700.0]), *states, run_blocks=run_blocks)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("with_audio", [False, True])
def test_tile_order_and_everything_kept_change_nothing(fused, with_audio):
    dit = nano()
    plain = forward(dit, with_audio=with_audio)
    if fused:
        apply_fused_blocks(dit, EagerOps())
    tokens, heads, layers = 72, dit.config.num_heads, dit.config.num_layers
    order = tile_order(GRID, (2, 3))
    assert not (order.tokens == row_order(GRID).tokens).all()
    lists = [BlockLists.of(table(heads, tokens, 16, 1.0), 16, tokens)] * layers
    sparse = OrderedBlocks(SparseBlocks.of(dit, eager_sparse_attention, lists), order, CPU)
    assert relative(forward(dit, sparse, with_audio), plain) < 2e-6


def test_a_plan_acts_in_the_layer_it_is_for():
    """Sparse in one layer equals a model whose attention leaves the same tokens out there, in row order."""
    dit = nano()
    order = tile_order(GRID, (2, 3))
    kept = torch.from_numpy(nearest_blocks(order, 8, 0.4, 2.0)).expand(dit.config.num_heads, -1, -1)
    lists = [None] * dit.config.num_layers
    lists[1] = BlockLists.of(kept, 8, 72)
    sparse = forward(dit, OrderedBlocks(SparseBlocks.of(dit, eager_sparse_attention, lists), order, CPU))

    places = torch.from_numpy(order.places)
    by_token = kept[0][places[:, None] // 8, places[None] // 8]
    dense, calls = dit.attention, []

    def attention(q, k, v):
        calls.append(1)
        if len(calls) != 2:
            return dense(q, k, v)
        scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT / q.shape[-1] ** 0.5).masked_fill(
            ~by_token, -torch.inf
        )
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)

    dit.attention = attention
    expected = forward(dit)
    assert len(calls) == dit.config.num_layers
    assert relative(sparse, expected) < 2e-6
    dit.attention = dense
    assert relative(sparse, forward(dit)) > 1e-4


def test_audio_follows_its_tokens_and_can_be_dealt_out():
    order = tile_order(GRID, (2, 3))
    frames = torch.from_numpy(order.positions[:, 0].copy())
    per_frame = [None, torch.randn(2, 3, 5)]
    audio = OrderedAudio(per_frame, frames)
    assert len(audio) == 2 and audio[0] is None
    assert torch.equal(audio[1], per_frame[1][:, frames])
    assert audio[:][0] is None and torch.equal(audio[0:2][1], audio[1])
    mine = TokenAudio(audio, 10, 20, 72)
    assert torch.equal(mine[1], audio[1][:, 10:30])


def test_an_order_for_another_grid_is_refused():
    dit = nano()
    with pytest.raises(ValueError, match="do not fit an order"):
        forward(dit, OrderedBlocks(dit.run_blocks, tile_order((3, 4, 5)), CPU))
