"""Colour match: equal to a slow twin in float64, each frame by itself, and harmless without colour."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omniavatar.model.colour import FROM_XYZ, LEAST_SPREAD, TO_XYZ, WHITE, ColourMatch, from_lab, to_lab


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Frames (1, 3, count, 16, 20) in [0, 1], 0 and 1 among them."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(1, 3, count, 16, 20, generator=generator) * 1.2 - 0.1).clamp_(0, 1)


def twin(frames: np.ndarray, portrait: np.ndarray, strength: float) -> np.ndarray:
    """The match of frames (N, H, W, 3) to a portrait (H, W, 3), pixel by pixel in float64."""

    def lab(rgb: np.ndarray) -> np.ndarray:
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        part = np.clip(linear @ np.array(TO_XYZ).T / np.array(WHITE), 1e-8, 1)
        f = np.where(part > 0.008856, np.cbrt(part), (903.3 * part + 16) / 116)
        x, y, z = np.moveaxis(f, -1, 0)
        return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)

    def rgb(values: np.ndarray) -> np.ndarray:
        lightness, a, b = np.moveaxis(values, -1, 0)
        y = (lightness + 16) / 116
        x, z = a / 500 + y, y - b / 200
        cubes = [np.where(f**3 > 0.008856, f**3, (116 * f - 16) / 903.3) for f in (x, z)]
        middle = np.where(lightness > 903.3 * 0.008856, y**3, lightness / 903.3)
        linear = np.stack([cubes[0], middle, cubes[1]], -1) * np.array(WHITE) @ np.array(FROM_XYZ).T
        curved = 1.055 * np.clip(linear, 0, None) ** (1 / 2.4) - 0.055
        return np.clip(np.where(linear > 0.0031308, curved, 12.92 * linear), 0, 1)

    wanted, out = lab(portrait), []
    for frame in frames:
        found = lab(frame)
        spread = found.std((0, 1))
        spread = np.where(spread < LEAST_SPREAD, 1, spread)
        moved = (found - found.mean((0, 1))) / spread * wanted.std((0, 1)) + wanted.mean((0, 1))
        out.append((1 - strength) * frame + strength * rgb(moved))
    return np.stack(out)


def last(frames: torch.Tensor) -> np.ndarray:
    """Frames (1, 3, N, H, W) as (N, H, W, 3) float64."""
    return frames[0].permute(1, 2, 3, 0).double().numpy()


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0])
def test_it_equals_the_twin(strength: float) -> None:
    frames, portrait = pictures(3), pictures(1, seed=1) * 0.5 + 0.2
    matched = ColourMatch.to(portrait, strength)(frames)
    assert np.abs(last(matched) - twin(last(frames), last(portrait)[0], strength)).max() < 2e-5


def test_each_frame_is_matched_by_itself() -> None:
    frames, match = pictures(4), ColourMatch.to(pictures(1, seed=1), 1.0)
    together = match(frames)
    alone = [match(frames[:, :, index : index + 1]) for index in range(4)]
    assert torch.equal(together, torch.cat(alone, dim=2))


def test_a_grey_frame_gets_no_coloured_noise() -> None:
    """Rounding noise of a and b is not stretched to the portrait's spread."""
    grey = torch.rand(1, 1, 1, 32, 32, generator=torch.Generator().manual_seed(2)).expand(-1, 3, -1, -1, -1)
    matched = to_lab(ColourMatch.to(pictures(1, seed=1) * 0.3 + 0.3, 1.0)(grey.contiguous()))
    inside = (matched[:, 0] > 20) & (matched[:, 0] < 80)
    for channel in (1, 2):
        assert float(matched[:, channel][inside].std()) < 1.0


def test_lab_and_back() -> None:
    frames = pictures(2)
    assert (from_lab(to_lab(frames)) - frames).abs().max() < 5e-5
