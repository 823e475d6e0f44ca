"""The VAE's work by rows over several processes: pixels and latents of one process, on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from omniavatar.accel.shared_vae import apply_shared_vae
from omniavatar.accel.vae import FastVAE, FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.vae import random_vae
from omniavatar.model.vae import VAEConfig
from omniavatar.parallel.team import Ranks
from ranks import RankPool

SLOW_TWINS = {"merged_upsample": False, "matmul_attention": False, "paired_columns": False}


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RankPool]]:
    folder = tmp_path_factory.mktemp("ranks")
    made = {size: RankPool(size, folder) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()


def fast_vae(at_once: int = 2, dtype: torch.dtype = torch.float32, **options: bool) -> FastVAE:
    vae = random_vae(VAEConfig(dim=8), dtype=dtype, device="cpu", seed=0)
    config = FastVAEConfig("eager", latents_at_once=at_once, frames_at_once=4 * at_once, **options)
    return apply_fast_vae(vae, config)


def clip(rows: int, columns: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    latent = torch.randn(batch, 16, 4, rows, columns, generator=generator)
    return latent, torch.rand(batch, 3, 9, 8 * rows, 8 * columns, generator=generator) * 2 - 1


def coded(vae: FastVAE, split, rows: int, columns: int, batch: int = 1) -> tuple[list[Tensor], Tensor]:
    latent, video = clip(rows, columns, batch)
    shared = vae if split is None else apply_shared_vae(vae, split)
    with torch.inference_mode():
        return list(shared.decode_stream(latent)), shared.encode(video)


def coded_on_ranks(team: Ranks, rows: int, columns: int, batch: int, at_once: int, options):
    return coded(fast_vae(at_once, **options), team.picture_rows, rows, columns, batch)


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("size", "rows", "columns", "batch", "at_once", "options"),
    [
        (2, 4, 4, 1, 2, {}),
        (2, 5, 3, 1, 1, {}),  # uneven rows, odd columns
        (2, 2, 3, 1, 2, SLOW_TWINS),
        (4, 7, 3, 1, 2, {}),
        (4, 4, 2, 2, 2, SLOW_TWINS),  # one row each
        (4, 3, 4, 1, 2, {}),  # fewer rows than ranks: each computes all
    ],
)
def test_rows_on_ranks_are_the_picture_of_one(
    pools: dict[int, RankPool], size: int, rows: int, columns: int, batch: int, at_once: int, options
) -> None:
    pieces, latents = coded(fast_vae(at_once, **options), None, rows, columns, batch)
    found = pools[size].run(coded_on_ranks, rows, columns, batch, at_once, options)
    for pieces_there, latents_there in found:
        for there, first, alone in zip(pieces_there, found[0][0], pieces, strict=True):
            assert torch.equal(there, first)
            assert largest_difference(there, alone) < 1e-5
        assert torch.equal(latents_there, found[0][1])
        assert largest_difference(latents_there, latents) < 1e-5
