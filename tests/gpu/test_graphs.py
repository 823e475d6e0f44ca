"""On GPUs: captured blocks and direct copies of heads are bit-identical to plain execution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.accel.graphs import FORWARDS_FIRST, CudaCapture, GraphedBlocks
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.model.dit import WanDiT
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.ranks import Ranks
from ranks import RankPool

pytestmark = pytest.mark.gpu


def make(device: torch.device, attention: str, quantize: str, heads: int = 12) -> WanDiT:
    _, backend = create_attention(attention, device, torch.bfloat16)
    spec = replace(scale_spec("1.3B").dit, num_heads=heads, dim=128 * heads)
    dit = random_dit(spec, attention=backend, dtype=torch.bfloat16, device=device, seed=0)
    apply_accelerations(dit, AccelConfig(quantize, True), create_fused(device))  # type: ignore[arg-type]
    return dit


def arguments(dit: WanDiT, seed: int, frames: int, heard: bool = True) -> tuple[object, ...]:
    device = dit.head.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (
        (1, 16, frames, 50, 90),
        (1, 17, frames, 50, 90),
        (1, 512, dit.config.text_dim),
        (1, 4 * frames - 3, dit.config.audio_dim),
    )
    x, y, text, audio = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    time = torch.tensor([900.0 - 100 * seed], device=device)
    return x, y, time, dit.prepare_text(text), dit.prepare_audio(audio if heard else None)


def backend_or_skip(attention: str) -> None:
    if attention not in ("auto", *ATTENTION.available(torch.device("cuda", 0))):
        pytest.skip("FlashAttention-3 is not available")


@pytest.mark.parametrize(("attention", "quantize"), [("auto", "none"), ("fa3_fp8", "fp8")])
def test_a_captured_forward_is_the_forward(attention: str, quantize: str) -> None:
    backend_or_skip(attention)
    device = torch.device("cuda", 0)
    dit = make(device, attention, quantize)
    graphed = GraphedBlocks(dit.run_blocks, CudaCapture())
    with torch.inference_mode():
        calls = [arguments(dit, seed, 3) for seed in range(2)] + [arguments(dit, 0, 3, heard=False)]
        calls += [arguments(dit, 1, 2)]
        expected = [dit(*each) for each in calls]  # type: ignore[arg-type]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = [
                [dit(*each, run_blocks=graphed) for each in calls]  # type: ignore[arg-type]
                for _ in range(FORWARDS_FIRST + 3)
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for row in found for a, b in zip(row, expected, strict=True))


def test_memory_of_captures_is_used_again_and_released() -> None:
    """PyTorch ends a pool with its last graph and refuses to capture into it afterwards."""
    capture, device = CudaCapture(), torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before, held = torch.cuda.memory_reserved(), []
    for size in (2**24, 2**24, 2**24):
        replay, out = capture(lambda: torch.ones(size, device=device) + 1)  # noqa: B023
        replay()
        assert out.sum().item() == 2 * size
        del replay, out
        held.append(torch.cuda.memory_reserved())
    assert before < held[0] == held[1] == held[2]
    capture.release()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before
    replay, out = capture(lambda: torch.ones(4, device=device) * 3)
    replay()
    assert out.tolist() == [3.0] * 4


def forwards_on_gpus(team: Ranks, attention: str, quantize: str, heads: int) -> tuple[list[Tensor], ...]:
    """Outputs with collectives, direct copies and captured direct copies, for growing sizes, twice each."""
    device = torch.device("cuda", team.rank)
    results = []
    for exchange, captured in (("collective", False), ("direct", False), ("direct", True)):
        said = team.arrange(Layout(1, team.size, heads), exchange)  # type: ignore[arg-type]
        assert said is not None and ("direct" in said) == team.captures == (exchange == "direct")
        dit = make(device, attention, quantize, heads)
        team.apply(dit)
        blocks = GraphedBlocks(dit.run_blocks, CudaCapture()) if captured else dit.run_blocks
        with torch.inference_mode():
            calls = [arguments(dit, seed, frames) for seed, frames in ((0, 2), (1, 3), (2, 5), (3, 3))]
            large = arguments(dit, 4, 7)

            def run(call: tuple[object, ...]) -> Tensor:
                return dit(*call, run_blocks=team.shard(blocks)).cpu()  # type: ignore[arg-type]  # noqa: B023

            for _ in range(FORWARDS_FIRST + 2):
                found = [run(each) for each in calls]
            found += [run(large)]  # the slots grow, and what was captured still has its own
            found += [run(each) for each in calls]
        results.append(found)
    return tuple(results)


@pytest.mark.parametrize(
    ("attention", "quantize", "heads"),
    [("auto", "none", 12), ("fa3_fp8", "fp8", 12), ("auto", "none", 11)],  # 11: keys and values are gathered
)
def test_direct_copies_between_gpus(attention: str, quantize: str, heads: int, tmp_path: Path) -> None:
    backend_or_skip(attention)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    pool = RankPool(2, tmp_path, "cuda")
    try:
        found = pool.run(forwards_on_gpus, attention, quantize, heads)
    finally:
        pool.close()
    for rank in found:
        for ways in zip(*rank, strict=True):
            assert all(torch.equal(each, ways[0]) for each in ways)
