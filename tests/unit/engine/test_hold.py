"""hold_background: what stands still is shown as in the first frame, and what moves is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omniavatar.engine.hold import TAKE_OVER, BackgroundHold, cells, from_border, weights

SIDE, LEVELS = 192, 8.0


def held(frames: Tensor, cuts: tuple[int, ...] = (), levels: float = LEVELS) -> Tensor:
    """Frames (n, H, W) in grey levels after the hold; `cuts`: frames of each piece."""
    pixels = (frames / 255.0).expand(3, -1, -1, -1)[None].clone()
    hold, number = BackgroundHold(levels), 0
    for piece in pixels.split(cuts or (pixels.shape[2],), dim=2):
        hold.apply(piece, number)
        number += piece.shape[2]
    return pixels[0, 0] * 255.0


def scene(count: int, noise: float = 3.0) -> tuple[Tensor, Tensor]:
    """A bright disc that goes across a background whose patches change slowly, and where it has been."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn((count, 1, 12, 12), generator=generator).cumsum(0)
    drift = torch.nn.functional.interpolate(drift, (SIDE, SIDE), mode="bilinear")[:, 0]
    frames = 100.0 + (drift * (noise / drift.abs().max())).clamp(-noise, noise)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = torch.stack([(rows - 96) ** 2 + (columns - 70 - 2 * number) ** 2 < 400 for number in range(count)])
    return torch.where(disc, 200.0, frames), disc


def test_a_background_rests_and_a_disc_moves() -> None:
    frames, disc = scene(25)
    shown = held(frames)
    been = disc.any(0)
    far = torch.nn.functional.max_pool2d(been[None].float(), 49, 1, 24)[0] == 0
    assert far.float().mean() > 0.5
    assert frames[:, far].std(0).mean() > 0.2
    assert shown[:, far].std(0).max() < 1e-3
    assert torch.equal(shown[:, far], shown[:1, far].expand(25, -1))
    near = torch.nn.functional.max_pool2d(disc.float(), 9, 1, 4) > 0
    near[0] = False
    torch.testing.assert_close(shown[near], frames[near], rtol=0, atol=1e-4)


@pytest.mark.parametrize("levels", [5e-324, 1e-44, 1e-30])
def test_the_smallest_levels_are_numbers_too(levels: float) -> None:
    """Of a background that is exactly white or black: what does not change at all is held."""
    frames = torch.zeros(5, SIDE, SIDE)
    frames[:, 100:] = 255.0
    assert torch.equal(held(frames, levels=levels), frames)


def test_no_border_shows_where_the_hold_ends() -> None:
    """The picture differs by 3 levels everywhere; the weights go over in no less than a cell."""
    frames, _ = scene(9, noise=0.0)
    frames[1:] += 3.0
    shown = held(frames)[1:]
    added = shown - frames[1:]
    assert added.min() < -2.9 and added.max() < 0.01
    assert added.diff(dim=1).abs().max() < 0.5 and added.diff(dim=2).abs().max() < 0.5


def test_what_moving_cells_enclose_is_not_held() -> None:
    """A ring of moving cells, as an outline of a head, around cells that rest; a gap opens it."""
    rest = torch.ones(1, 1, 12, 12)
    rest[..., 3:9, 3:9] = 0.0
    rest[..., 5:7, 5:7] = 1.0
    reached = from_border(rest)
    assert reached[..., 5:7, 5:7].sum() == 0 and reached.sum() == 144 - 36
    rest[..., 0:6, 5] = 1.0
    assert from_border(rest)[..., 5:7, 5:7].sum() == 4
    diagonal = torch.ones(1, 1, 5, 5)
    for row, column in ((1, 2), (2, 1), (2, 3), (3, 2)):
        diagonal[..., row, column] = 0.0
    assert from_border(diagonal)[..., 2, 2] == 0


def test_a_cheek_moves_as_the_model_made_it() -> None:
    """An outline and a mouth move; what lies between them changes by less than the limit."""
    frames = torch.full((9, SIDE, SIDE), 100.0)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    distance = ((rows - 96.0) ** 2 + (columns - 96.0) ** 2).sqrt()
    for number in range(9):
        frames[number] += 0.3 * number
        frames[number][(distance - 70 - number).abs() < 4] = 30.0
        frames[number][distance < 8 + number] = 160.0
    shown = held(frames)
    assert torch.equal(shown[1:, 96, 130], frames[1:, 96, 130] / 255.0 * 255.0)
    corner = shown[:, :16, :16]
    assert (corner - corner[:1]).abs().max() < 1e-3


def test_a_drift_is_let_go_little_by_little() -> None:
    """A background that becomes lighter by 12 levels in 121 frames is left without a jump."""
    frames = torch.full((121, SIDE, SIDE), 100.0) + 0.1 * torch.arange(121)[:, None, None]
    shown = held(frames)[:, 96, 96]
    assert shown[:40].max() < 100.01
    torch.testing.assert_close(shown[81:], frames[81:, 96, 96], rtol=0, atol=1e-3)
    steps = shown.diff()
    assert steps.min() > -0.01 and steps.max() < 0.35


def test_a_cell_is_let_go_before_it_moves_and_taken_over_slowly() -> None:
    moved = torch.zeros(8, 1, 3, 3)
    moved[3] = 1.0
    before = torch.ones(1, 1, 3, 3)
    weight = weights(moved, LEVELS, before)[:, 0, 1, 1].tolist()
    assert weight[:4] == pytest.approx([0.75, 0.5, 0.25, 0.0], abs=1e-6)
    assert weight[4:] == pytest.approx([number / TAKE_OVER for number in (1, 2, 3, 4)], abs=1e-6)


@pytest.mark.parametrize("cuts", [(1, *[4] * 6), (5, 8, 8, 4), (1, 8, 16)])
def test_pieces_change_nothing(cuts: tuple[int, ...]) -> None:
    frames, _ = scene(25)
    assert torch.equal(held(frames, cuts), held(frames))


def test_a_camera_that_moves_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.nn.functional.interpolate(
        torch.rand((1, 1, 24, 40), generator=generator) * 255, (SIDE, 2 * SIDE), mode="bilinear"
    )[0, 0]
    frames = torch.stack([wide[:, 6 * number : 6 * number + SIDE] for number in range(9)])
    torch.testing.assert_close(held(frames)[5:], frames[5:], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "grid"), [((192, 192), (24, 24)), ((720, 400), (43, 24)), ((32, 64), (24, 48))]
)
def test_cells_follow_the_shorter_side(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert cells(*size) == grid
    hold = BackgroundHold(LEVELS)
    pixels = torch.full((1, 3, 1, *size), 0.5)
    hold.apply(pixels, 0)
    assert hold.weight is not None and hold.weight.shape == (1, 1, *grid)
