"""One video on several processes: every way to share the work gives the result of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.attention.sparse import eager_sparse_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.residual_cache import ResidualCache
from omniavatar.accel.sparse_steps import SparseSteps
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.window_loop import WindowGenerator, WindowSampling
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import DiTConfig
from omniavatar.parallel.guidance import branch_owners
from omniavatar.parallel.rank_layout import Layout, deal, starts
from omniavatar.parallel.ranks import Ranks
from omniavatar.parallel.team import ONE
from omniavatar.parallel.weights import apply_shared_weights
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.sampling.schedule import make_schedule
from omniavatar.sampling.sparsity import PlanShape, calibrated_plan
from omniavatar.sampling.windows import plan_windows
from omniavatar.types import Conditioning, StepPlan
from ranks import RankPool

CPU = torch.device("cpu")
SMALL = DiTConfig(64, 96, 4, 3, text_dim=16, audio_dim=24, audio_hidden=8)
GRID = (3, 6, 10)
"""Latent frames, rows and columns: 45 tokens, which neither 2 nor 4 divides."""


def small_dit(heads: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> WanDiT:
    _, attention = create_attention("sdpa", CPU, dtype)
    config = replace(SMALL, num_heads=heads, dim=16 * heads)
    return random_dit(config, attention=attention, dtype=dtype, device="cpu", seed=seed)


def velocity(dit: WanDiT, team: Any, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    config = dit.config
    frames, rows, columns = GRID
    x = torch.randn(batch, 16, frames, rows, columns, generator=generator)
    y = torch.randn(batch, 17, frames, rows, columns, generator=generator)
    text = torch.randn(batch, 7, config.text_dim, generator=generator)
    audio = torch.randn(batch, 4 * frames - 3, config.audio_dim, generator=generator)
    with torch.inference_mode():
        states = dit.prepare_text(text), dit.prepare_audio(audio)
        time = torch.full((batch,), 700.0)
        return dit(x, y, time, *states, run_blocks=team.shard(dit.run_blocks))


def differs(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def forward_on_ranks(team: Ranks, heads: int, batch: int, fuse: bool, pieces: int, share: bool) -> Tensor:
    team.arrange(Layout(1, team.size, heads))
    dit = small_dit(heads)
    apply_accelerations(dit, AccelConfig(fuse=fuse), create_fused(CPU))
    team.apply(dit)
    team._sequence.pieces = pieces
    if share:
        apply_shared_weights(dit, team.weight_peers(), CPU)
    first = velocity(dit, team, batch)
    assert torch.equal(velocity(dit, team, batch), first)
    return first


@pytest.mark.parametrize(
    ("size", "heads", "batch", "fuse", "pieces", "share"),
    [
        (2, 4, 1, False, 1, False),
        (2, 4, 1, False, 2, False),  # heads in pieces, with overlapping exchanges
        (2, 4, 2, True, 1, False),  # fused: sent when computed, the output layer in two products
        (4, 4, 1, True, 1, False),
        (4, 6, 2, True, 1, True),
        (4, 4, 2, True, 4, False),
        (4, 6, 1, False, 2, False),  # 2 ranks share the heads, 2 the query tokens
        (2, 3, 2, True, 1, False),  # no number of ranks divides the heads
        (4, 6, 1, True, 3, True),
        (2, 4, 1, False, 2, True),
    ],
)
def test_a_shared_forward_equals_that_of_one_rank(
    pools: dict[int, RankPool], size: int, heads: int, batch: int, fuse: bool, pieces: int, share: bool
) -> None:
    expected = velocity(small_dit(heads), ONE, batch)
    found = pools[size].run(forward_on_ranks, heads, batch, fuse, pieces, share)
    for each in found:
        assert torch.equal(each, found[0])  # all ranks continue with the same sample
        assert differs(each, expected) < 1e-5


def test_the_comparison_would_notice_a_missing_exchange(pools: dict[int, RankPool]) -> None:
    expected = velocity(small_dit(), ONE)
    assert all(differs(each, expected) > 1e-3 for each in pools[2].run(forward_without_exchange))


def forward_without_exchange(team: Ranks) -> Tensor:
    team.arrange(Layout(1, team.size, 4))
    return velocity(small_dit(), team)


def test_shared_weights_leave_a_rank_its_part(pools: dict[int, RankPool]) -> None:
    whole = sum(tensor.numel() * 4 for tensor in small_dit().blocks.parameters())
    for held, buffers in pools[4].run(held_bytes):
        assert held < whole / 4 * 1.1 + buffers
    assert buffers < whole


def held_bytes(team: Ranks) -> tuple[int, int]:
    team.arrange(Layout(1, team.size, 4))
    dit = small_dit()
    ring = apply_shared_weights(dit, team.weight_peers(), CPU)
    kept = sum(len(piece) for piece in ring._hosts.values())
    for block in dit.blocks:
        for name in ("k", "v"):
            kept += len(block.get_submodule("cross_attn").get_submodule(name)._piece)
        assert all(p.is_meta for p in block.get_submodule("ffn").parameters())
    return kept, sum(len(slot.buffer) for slot in ring.slots)


class HalfVAE:
    """Replaces the VAE on the leader: its hand-over depends on the decoded latents."""

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        frames = latent.shape[2] * 4 - 3
        yield latent[:, :3].mean(2, keepdim=True).expand(-1, -1, frames, -1, -1).clone()

    def encode(self, pixels: Tensor) -> Tensor:
        count = (pixels.shape[2] + 3) // 4
        return pixels.mean((1, 2), keepdim=True).expand(-1, 16, count, -1, -1).clone()


def two_windows(
    team: Any,
    layout: Layout,
    scales: tuple[float, float],
    computed: str,
    interval: tuple[float, float],
    dit: WanDiT | None = None,
    sparse: SparseSteps | None = None,
) -> list[Tensor]:
    if dit is None:
        team.arrange(layout)
        dit = small_dit()
        team.apply(dit)
    generator = torch.Generator().manual_seed(2)
    windows = plan_windows(20, 9 + 4, 5)[:2]
    rows = windows[-1].start + windows[-1].length
    audio = torch.randn(rows, SMALL.audio_dim, generator=generator).numpy()
    text = [torch.randn(1, 5, SMALL.text_dim, generator=generator) for _ in range(2)]
    reference = torch.randn(1, 16, 1, *GRID[1:], generator=generator)
    conditioning = Conditioning(*text, reference, audio if team.leads else np.empty((0, SMALL.audio_dim)))
    plan = StepPlan(tuple(letter == "C" for letter in computed))
    branches = guidance_branches(*scales, has_audio=True)
    passes = plan_passes(plan, branches, has_audio=True, interval=interval)
    sampling = WindowSampling(7, make_schedule(len(computed), 5.0, None), passes)
    vae = HalfVAE() if team.leads else None
    made = WindowGenerator(
        dit, vae, conditioning, sampling, NullRecorder(), make_cache=ResidualCache, team=team, sparse=sparse
    )
    return [result.latent for result in made.run(windows)]


def sparse_windows(team: Any, layout: Layout, computed: str) -> list[Tensor]:
    """Two windows whose heads keep other blocks in every layer and step; the first step is dense."""
    team.arrange(layout)
    dit = small_dit()
    team.apply(dit)
    shape = PlanShape(len(computed), SMALL.num_layers, 4, (4, 3, 5), 7)
    generator = np.random.default_rng(0)

    def mass(step: int, layer: int) -> np.ndarray:
        return generator.dirichlet(np.full(shape.blocks, 0.3), (4, shape.blocks))

    plan = calibrated_plan(shape, mass, 0.7, [0])
    heads = team.own_heads(4)
    sparse = SparseSteps(
        dit, plan, eager_sparse_attention, dit.run_blocks, CPU, spread=team.spread, heads=heads
    )
    return two_windows(team, layout, (4.5, 3.0), computed, (0.0, 1.0), dit, sparse)


@pytest.mark.parametrize(
    ("size", "guidance", "computed"),
    [(2, 1, "CCC"), (2, 1, "CCsC"), (2, 2, "CCC"), (4, 1, "CCC"), (4, 2, "CCs")],
)
def test_sparse_windows_equal_those_of_one_rank(
    pools: dict[int, RankPool], size: int, guidance: int, computed: str
) -> None:
    expected = sparse_windows(ONE, Layout(1, 1, 4), computed)
    dense = two_windows(ONE, Layout(1, 1, 4), (4.5, 3.0), computed, (0.0, 1.0))
    found = pools[size].run(sparse_windows, Layout(guidance, size // guidance, 4), computed)
    for rank in found:
        for latent, first, single, plain in zip(rank, found[0], expected, dense, strict=True):
            assert torch.equal(latent, first)
            assert differs(latent, single) < 1e-5 < differs(single, plain)


@pytest.mark.parametrize(
    ("size", "guidance", "scales", "computed", "interval"),
    [
        (2, 2, (4.5, 4.5), "CCC", (0.0, 1.0)),
        (2, 2, (4.5, 3.0), "CsC", (0.0, 1.0)),  # three branches on two groups, some steps reused
        (2, 2, (1.0, 1.0), "CC", (0.0, 1.0)),  # one branch: the other group waits
        (2, 1, (4.5, 4.5), "CsC", (0.0, 1.0)),
        (4, 2, (4.5, 4.5), "CsCs", (0.0, 0.5)),
        (4, 2, (1.0, 2.0), "CCC", (0.4, 1.0)),
        (4, 1, (4.5, 3.0), "Css", (0.0, 1.0)),
    ],
)
def test_shared_windows_equal_those_of_one_rank(
    pools: dict[int, RankPool],
    size: int,
    guidance: int,
    scales: tuple[float, float],
    computed: str,
    interval: tuple[float, float],
) -> None:
    expected = two_windows(ONE, Layout(1, 1, 4), scales, computed, interval)
    layout = Layout(guidance, size // guidance, 4)
    found = pools[size].run(two_windows, layout, scales, computed, interval)
    for rank in found:
        for latent, first, single in zip(rank, found[0], expected, strict=True):
            assert torch.equal(latent, first)
            assert differs(latent, single) < 1e-5
    if layout.sequence == 1:
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True))


def orders_and_floats(team: Ranks) -> tuple[Any, Tensor]:
    values = torch.arange(6.0).view(2, 3) if team.leads else None
    shared = team.share(values, (2, 3), CPU)
    if team.leads:
        team.order({"n": 3})
        return {"n": 3}, shared
    return team.next_order(), shared


def test_the_leader_is_heard(pools: dict[int, RankPool]) -> None:
    for order, shared in pools[4].run(orders_and_floats):
        assert order == {"n": 3} and torch.equal(shared, torch.arange(6.0).view(2, 3))


def bytes_of_any_type(team: Ranks) -> bool:
    team.arrange(Layout(1, team.size, 2))
    peers = team.weight_peers()
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32):
        rows = torch.full((3 - peers.index, 4), peers.index + 1.0).to(dtype)
        whole = peers.gather(rows, [3, 2]).float()
        assert whole[:, 0].tolist() == [1, 1, 1, 2, 2]
        send = [1, 2 - peers.index]
        receive = [1, 1] if peers.index == 0 else [2, 1]
        got = peers.all_to_all(rows[: sum(send)], send, receive).wait().float()
        assert got[:, 0].tolist() == ([1, 2] if peers.index == 0 else [1, 1, 2])
    return True


def test_uneven_rows_of_any_type_arrive(pools: dict[int, RankPool]) -> None:
    assert pools[2].run(bytes_of_any_type) == [True, True]


@pytest.mark.parametrize(("guidance", "sequence", "heads"), [(1, 8, 12), (2, 4, 40), (3, 2, 12), (1, 5, 12)])
def test_layout_gives_every_rank_one_index(guidance: int, sequence: int, heads: int) -> None:
    layout = Layout(guidance, sequence, heads)
    assert heads % layout.ulysses == 0 and layout.ulysses * layout.rows == sequence
    for groups in (
        layout.guidance_peers(),
        layout.sequence_peers(),
        layout.head_peers(),
        layout.row_peers(),
    ):
        assert sorted(rank for group in groups for rank in group) == list(range(layout.size))
    for group in layout.row_peers():
        assert [layout.sequence_of(rank) // layout.ulysses for rank in group] == list(range(layout.rows))
    for group in layout.guidance_peers():
        assert [layout.guidance_of(rank) for rank in group] == list(range(guidance))


def test_tokens_are_dealt_out_whole() -> None:
    for total, parts in ((30375, 4), (45, 2), (3, 3)):
        sizes = deal(total, parts)
        assert sum(sizes) == total and max(sizes) - min(sizes) <= 1
        assert starts(sizes)[-1] + sizes[-1] == total


def test_branches_of_the_fullest_step_are_dealt_out_first() -> None:
    branches = guidance_branches(1.0, 2.0, has_audio=True)
    passes = plan_passes(StepPlan((True,) * 4), branches, True, (0.5, 1.0))
    owners = branch_owners(passes, 2)
    assert {owners[branch.name] for branch in branches} == {0, 1}


def test_the_released_sizes_share_their_heads() -> None:
    wide, narrow = scale_spec("14B").dit.num_heads, scale_spec("1.3B").dit.num_heads
    assert [Layout(1, n, wide).rows for n in (2, 4, 8)] == [1, 1, 1]
    assert [Layout(1, n, narrow).rows for n in (2, 4, 8)] == [1, 1, 2]


@pytest.mark.parametrize(("backend", "priority"), [("nccl", True), ("gloo", None)])
def test_groups_of_nccl_have_priority(
    monkeypatch: pytest.MonkeyPatch, backend: str, priority: bool | None
) -> None:
    given: list[Any] = []

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=SimpleNamespace), raising=False)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "new_group", lambda *_, **options: given.append(options.get("pg_options")))
    ranks = object.__new__(Ranks)
    ranks.rank = 0
    ranks._new_peers([[0, 1]])
    assert [getattr(options, "is_high_priority_stream", None) for options in given] == [priority]
