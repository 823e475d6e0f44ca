"""One video on several ranks: kernels on the share of a rank, weights gathered by NCCL, two real GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.vae import FastVAEConfig, SplitRows, apply_fast_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.vae import VideoVAE
from omniavatar.parallel.exchange import CollectiveHeads, CollectiveRows
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.picture_rows import PictureRows
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.ranks import Ranks
from omniavatar.parallel.sequence import SequenceParallel
from omniavatar.parallel.vae import apply_shared_vae
from omniavatar.parallel.weights import apply_shared_weights
from rank_commands import FAULTS, check_fault, generate_command
from ranks import RankPool
from thread_ranks import Board, ThreadPeers, on_threads

pytestmark = pytest.mark.gpu
GRID = (5, 50, 90)


def thread_ranks(layout: Layout, pieces: int) -> list[SequenceParallel]:
    def peers(lists: list[list[int]]) -> dict[int, ThreadPeers]:
        found = {}
        for ranks in lists:
            board = Board(len(ranks))
            found |= {rank: ThreadPeers(board, place, len(ranks)) for place, rank in enumerate(ranks)}
        return found

    whole, heads, rows = (
        peers(each) for each in (layout.sequence_peers(), layout.head_peers(), layout.row_peers())
    )
    return [
        SequenceParallel(whole[r], CollectiveHeads(heads[r]), CollectiveRows(rows[r]), pieces)
        for r in range(layout.size)
    ]


def make(device: torch.device, attention: str, quantize: Any, seed: int = 0) -> WanDiT:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = scale_spec("1.3B" if device.type == "cuda" else "nano").dit
    _, backend = create_attention(attention, device, dtype)
    dit = random_dit(spec, attention=backend, dtype=dtype, device=device, seed=seed)
    apply_accelerations(dit, AccelConfig(quantize, True), create_fused(device))
    return dit


def arguments(dit: WanDiT, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator(device).manual_seed(0)
    x, y, text, audio = (
        torch.randn(shape, generator=generator, device=device)
        for shape in (
            (1, 16, *GRID),
            (1, 17, *GRID),
            (1, 512, dit.config.text_dim),
            (1, 4 * GRID[0] - 3, dit.config.audio_dim),
        )
    )
    return x, y, torch.tensor([800.0], device=device), dit.prepare_text(text), dit.prepare_audio(audio)


def shared_forward(
    device: torch.device, size: int, attention: str, quantize: str
) -> tuple[Tensor, list[Tensor]]:
    dit = make(device, attention, quantize)
    with torch.inference_mode():
        args = arguments(dit, device)
        alone = dit(*args)
    inner = dit.attention
    current = threading.local()
    dit.attention = lambda q, k, v: current.attention(q, k, v)
    dit.attention.takes_float8 = attention == "fa3_fp8"  # type: ignore[attr-defined]
    ranks = thread_ranks(Layout(1, size, dit.config.num_heads), pieces=2)

    def work(rank: int) -> Tensor:
        current.attention = ranks[rank].attention(inner)
        return dit(*args, run_blocks=ranks[rank].shard(dit.run_blocks))

    return alone, on_threads(size, work)


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(("attention", "quantize"), [("auto", "none"), ("auto", "fp8"), ("fa3_fp8", "fp8")])
def test_kernels_on_a_ranks_tokens(size: int, attention: str, quantize: str) -> None:
    device = torch.device("cuda", 0)
    if attention not in ("auto", *ATTENTION.available(device)):
        pytest.skip("FlashAttention-3 is not available")
    alone, found = shared_forward(device, size, attention, quantize)
    for each in found:
        assert torch.equal(each, found[0])
        assert (each - alone).norm() / alone.norm() < 1e-2


@pytest.mark.parametrize("quantize", ["none", "fp8"])
def test_weights_gathered_by_nccl_are_the_weights(quantize: str, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    dit = make(device, "auto", quantize)
    with torch.inference_mode():
        args = arguments(dit, device)
        expected = dit(*args)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        apply_shared_weights(dit, Peers(group, 0, 1), device)
        with torch.inference_mode():
            args = arguments(dit, device)
            for _ in range(3):
                assert torch.equal(dit(*args), expected)
    finally:
        dist.destroy_process_group()


def coded(
    device: torch.device, dtype: torch.dtype, split: SplitRows | None
) -> tuple[Tensor, Tensor, VideoVAE]:
    """Pixels of 4 latents and latents of 9 frames by the released VAE's sizes, and the VAE."""
    vae: VideoVAE = apply_fast_vae(
        random_vae(VAEConfig(), dtype=dtype, device=device, seed=0), FastVAEConfig()
    )
    generator = torch.Generator(device).manual_seed(3)
    latent = torch.randn(1, 16, 4, 25, 20, generator=generator, device=device)
    video = torch.rand(1, 3, 9, 200, 160, generator=generator, device=device) * 2 - 1
    if split is not None:
        vae = apply_shared_vae(vae, split)
    with torch.inference_mode():
        return torch.cat(list(vae.decode_stream(latent)), dim=2), vae.encode(video), vae


@pytest.fixture
def exact_float32() -> Iterator[None]:
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_the_vae_on_a_ranks_rows(
    size: int, dtype: torch.dtype, tolerance: float, exact_float32: None
) -> None:
    device = torch.device("cuda", 0)
    pixels, latents, _ = coded(device, dtype, None)
    board = Board(size)

    def work(rank: int) -> tuple[Tensor, ...]:
        return coded(device, dtype, lambda rows: PictureRows(ThreadPeers(board, rank, size), rows))[:2]

    for found in on_threads(size, work):
        for there, alone in zip(found, (pixels, latents), strict=True):
            assert (there - alone).norm() / alone.norm() < tolerance


def coded_on_gpu(team: Ranks, exchange: Any) -> tuple[Tensor, Tensor]:
    """In the second run no call may make the host wait."""
    team.arrange(Layout(1, team.size, 12), exchange)
    device = torch.device("cuda", team.rank)
    pixels, latents, vae = coded(device, torch.bfloat16, team.picture_rows)
    with torch.inference_mode():
        clip = pixels[:, :, :9].clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = list(vae.decode_stream(latents))
            vae.encode(clip)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(piece.shape[2] for piece in again) == 9
    return pixels.cpu(), latents.cpu()


@pytest.mark.parametrize("exchange", ["collective", "direct"])
def test_two_gpus_share_a_picture(exchange: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    alone = coded(torch.device("cuda", 0), torch.bfloat16, None)[:2]
    pool = RankPool(2, tmp_path, "cuda")
    try:
        found = pool.run(coded_on_gpu, exchange)
    finally:
        pool.close()
    for here, there, single in zip(*found, alone, strict=True):
        assert torch.equal(here, there)
        assert (here - single.cpu()).norm() / single.cpu().norm() < 4e-2


@pytest.mark.parametrize(
    "shares", ["sp_size=2", "cfg_parallel=2", "sp_size=2,use_fsdp=true", "sp_size=2,vae_parallel=false"]
)
def test_two_gpus_make_the_video_of_one(shares: str, nano_checkpoint: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [
        sys.executable,
        "-m",
        "omniavatar.cli",
        *generate_command(nano_checkpoint, tmp_path, device="auto"),
    ]
    command.append("--quiet")
    videos = []
    for name, more in (("one", []), ("two", ["--gpus", "0,1", f"--hp={shares}"])):
        videos.append(tmp_path / f"{name}.mp4")
        subprocess.run([*command, "--output", str(videos[-1]), *more], check=True, timeout=300)
    one, two = (
        np.stack([frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]).astype(
            int
        )
        for path in videos
    )
    assert np.abs(one - two).mean() < 1
    assert json.loads(videos[1].with_suffix(".json").read_text())["processes"] == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gpu_that_fails_in_a_forward_ends_the_run(
    fault: str, nano_checkpoint: Path, tmp_path: Path
) -> None:
    """The other GPU waits in a kernel for data from the failing one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check_fault(fault, generate_command(nano_checkpoint, tmp_path, device="auto"), tmp_path)
