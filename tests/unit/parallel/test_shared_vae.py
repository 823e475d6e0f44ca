"""The VAE shared by several processes: every rank gets the pixels and latents of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniavatar.accel.decoder import OtherDecoder
from omniavatar.accel.vae import FastVAE, FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.vae import random_vae
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError
from omniavatar.model.sizes import VAEConfig
from omniavatar.parallel.picture_rows import PictureRows
from omniavatar.parallel.ranks import Ranks
from omniavatar.parallel.vae import apply_shared_vae
from omniavatar.plan.sizes import coding_bytes, vae_ranks
from ranks import RankPool

SLOW_TWINS = {"merged_upsample": False, "matmul_attention": False, "paired_columns": False}


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
        (4, 3, 4, 1, 2, {}),  # fewer rows than ranks: each rank computes all rows
    ],
)
def test_shared_rows_equal_the_picture_of_one_rank(
    pools: dict[int, RankPool], size: int, rows: int, columns: int, batch: int, at_once: int, options
) -> None:
    pieces, latents = coded(fast_vae(at_once, **options), None, rows, columns, batch)
    found = pools[size].run(coded_on_ranks, rows, columns, batch, at_once, options)
    for rank_pieces, rank_latents in found:
        for piece, first in zip(rank_pieces, found[0][0], strict=True):
            assert torch.equal(piece, first)
        assert largest_difference(torch.cat(rank_pieces, 2), torch.cat(pieces, 2)) < 1e-5
        assert torch.equal(rank_latents, found[0][1])
        assert largest_difference(rank_latents, latents) < 1e-5


def test_float8_rows_equal_the_picture_of_one_rank(pools: dict[int, RankPool]) -> None:
    """Other heights round differently in float32, which moves a few numbers by a step of float8."""
    options = {"float8": True}
    pieces, latents = coded(fast_vae(2, **options), None, 5, 3)
    whole = torch.cat(pieces, 2)
    exact = torch.cat(coded(fast_vae(2), None, 5, 3)[0], 2)
    (rank_pieces, rank_latents), other = pools[2].run(coded_on_ranks, 5, 3, 1, 2, options)
    assert torch.equal(torch.cat(rank_pieces, 2), torch.cat(other[0], 2))
    error = float((torch.cat(rank_pieces, 2) - whole).norm() / whole.norm())
    assert error < 0.1 * float((exact - whole).norm() / whole.norm())
    assert float((rank_latents - latents).norm() / latents.norm()) < 3e-3


class Strangers(PictureRows):
    """Picture rows whose neighbours send zeros."""

    def border(self, window: Tensor, above: bool = True, below: bool = True) -> None:
        if above:
            window[:, 0].zero_()
        if below:
            window[:, -1].zero_()


def coded_by_strangers(team: Ranks) -> tuple[list[Tensor], Tensor]:
    return coded(fast_vae(), lambda rows: Strangers(team._everyone, rows), 4, 4)


def test_the_comparison_would_notice_a_missing_row(pools: dict[int, RankPool]) -> None:
    pieces, latents = coded(fast_vae(), None, 4, 4)
    found_pieces, found_latents = pools[2].run(coded_by_strangers)[0]
    assert largest_difference(torch.cat(found_pieces, 2), torch.cat(pieces, 2)) > 1e-2
    assert largest_difference(found_latents, latents) > 1e-2


def borders(team: Ranks) -> list[Tensor]:
    """The windows of a rank after a swap; the rows of rank r hold the value r + 1."""
    made = []
    for above, below in ((True, True), (False, True), (True, False)):
        window = torch.full((2, 3 + above + below, 2, 1), team.rank + 1.0)
        window[:, : int(above)] = window[:, 3 + above :] = 9.0
        PictureRows(team._everyone, 3 * team.size).border(window, above, below)
        made.append(window[0, :, 0, 0])
    return made


def test_border_rows_come_from_neighbours_and_are_zero_beyond_the_picture(pools: dict[int, RankPool]) -> None:
    for rank, (both, below, above) in enumerate(pools[4].run(borders)):
        before, after = float(rank), float(rank + 2) if rank < 3 else 0.0
        own = [rank + 1.0] * 3
        assert both.tolist() == [before, *own, after]
        assert below.tolist() == [*own, after] and above.tolist() == [before, *own]


def test_rows_are_dealt_out_whole() -> None:
    frames = torch.arange(56.0).view(1, 56, 1, 1)
    runs = [PictureRows(Place(rank, 4), 7).mine(frames) for rank in range(4)]  # type: ignore[arg-type]
    assert [run.shape[1] for run in runs] == [16, 16, 16, 8] and torch.equal(torch.cat(runs, 1), frames)
    with pytest.raises(ValueError, match="54 pixel rows are not a multiple of 7"):
        PictureRows(Place(0, 2), 7).mine(frames[:, :54])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 rows are too few for 4 ranks"):
        PictureRows(Place(0, 4), 3)  # type: ignore[arg-type]


class Place:
    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size


def test_a_smaller_decoder_is_shared_where_it_is_a_fast_vae() -> None:
    calls: list[int] = []

    def split(rows: int) -> None:
        calls.append(rows)

    latent, video = clip(2, 2)
    shared = apply_shared_vae(OtherDecoder(fast_vae(), fast_vae()), split)
    with torch.inference_mode():
        list(shared.decode_stream(latent))
        shared.encode(video)
    assert calls == [2, 2]
    with pytest.raises(TypeError, match="only the fast VAE"):
        apply_shared_vae(random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=0), split)


def config(**changes: object) -> PipelineConfig:
    return load_config(None, {"weights": "random", "scale": "nano", "device": "cpu", **changes}).config


@pytest.mark.parametrize(
    ("changes", "vae", "ranks"),
    [
        ({"sp_size": 2, "cfg_parallel": 2}, "fast", 4),
        ({"sp_size": 2, "decoder": "lightvae"}, "fast", 2),
        ({"sp_size": 2}, "fp8", 2),
        ({"sp_size": 2, "decoder": "taehv"}, "fast", 1),
        ({"sp_size": 2, "vae_parallel": False}, "fast", 1),
        ({"sp_size": 2}, "plain", 1),
        ({}, "fast", 1),
    ],
)
def test_who_shares_the_vae(changes: dict[str, object], vae: str, ranks: int) -> None:
    assert vae_ranks(config(**changes), vae) == ranks
    if ranks == 1:
        with pytest.raises(ConfigError, match="vae_parallel: needs several processes"):
            vae_ranks(config(**{**changes, "vae_parallel": True, "decoder": "taehv"}), vae)


def test_memory_of_past_frames_is_divided() -> None:
    def of(ranks: int, rows: int = 400) -> int:
        return coding_bytes(96, (rows, 720), 2, 2, 13, True, ranks)

    assert 0.8 < of(2) / of(1) < 0.95 and 0.8 < of(4) / of(1) < 0.95
    assert of(64, 256) == of(1, 256)  # 32 latent rows
