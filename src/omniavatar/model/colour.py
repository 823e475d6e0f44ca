"""Colour match: every frame gets the portrait's mean and spread in CIE Lab.

Long videos drift in colour, since each window starts from the last frames of the one before. Matching them to
the portrait before they are handed over stops that. Each frame is matched by itself, so the result does not
depend on how a clip is cut. Plain tensor maths: the same on a CPU and on a GPU.

A frame without colour has a spread of a and b that is rounding noise of float32 (1e-5). Stretching it to the
portrait's spread would make noise visible, so a spread below `LEAST_SPREAD` counts as 1.
Source: SoulX-FlashHead (its inference code), whose limit is 1e-8; sRGB and CIE Lab with the white D65.

Shapes: B clips, N frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
FROM_XYZ = (
    (3.2404542, -1.5371385, -0.4985314),
    (-0.9692660, 1.8760108, 0.0415560),
    (0.0556434, -0.2040259, 1.0572252),
)
WHITE = (0.95047, 1.0, 1.08883)
TO_RELATIVE = tuple(tuple(each / white for each in row) for row, white in zip(TO_XYZ, WHITE, strict=True))
FROM_RELATIVE = tuple(tuple(each * white for each, white in zip(row, WHITE, strict=True)) for row in FROM_XYZ)
"""The same for XYZ as parts of the white's."""
EPSILON, KAPPA = 0.008856, 903.3
"""Where the cube root of CIE Lab becomes a line, and the slope of the line."""
LEAST_SPREAD = 1e-3
"""Of a channel of Lab, whose lightness goes to 100."""


@dataclass(frozen=True, eq=False)
class ColourMatch:
    """Moves the colours of frames towards those of a portrait.

    - mean, spread: of the portrait, each (1, 3, 1, 1, 1) in Lab.
    - strength: 0 leaves the frames as they are, 1 matches them.
    """

    mean: Tensor
    spread: Tensor
    strength: float

    @classmethod
    def to(cls, portrait: Tensor, strength: float) -> ColourMatch:
        """A match to `portrait`, (1, 3, 1, H, W) in [0, 1]."""
        mean, spread = _statistics(to_lab(portrait.float()))
        return cls(mean, spread, strength)

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames (B, 3, N, H, W) float32 in [0, 1], matched."""
        lab = to_lab(frames)
        mean, spread = _statistics(lab)
        spread = torch.where(spread < LEAST_SPREAD, torch.ones_like(spread), spread)
        matched = from_lab(lab.sub_(mean).mul_(self.spread / spread).add_(self.mean))
        if self.strength == 1.0:
            return matched
        return frames.lerp(matched, self.strength)


def to_lab(rgb: Tensor) -> Tensor:
    """CIE Lab of sRGB (B, 3, N, H, W) in [0, 1]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92)
    relative = _mixed(linear, TO_RELATIVE).clamp_(1e-8, 1.0)
    f = torch.where(relative > EPSILON, relative.pow(1.0 / 3.0), (KAPPA * relative + 16.0) / 116.0)
    x, y, z = f.unbind(1)
    return torch.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], dim=1)


def from_lab(lab: Tensor) -> Tensor:
    """sRGB in [0, 1] of CIE Lab (B, 3, N, H, W)."""
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16.0) / 116.0
    f = torch.stack([a / 500.0 + y, y, y - b / 200.0], dim=1)
    cubed = f * f * f
    line = (116.0 * f - 16.0) / KAPPA
    above = cubed > EPSILON
    above[:, 1] = lightness > KAPPA * EPSILON
    linear = _mixed(torch.where(above, cubed, line), FROM_RELATIVE)
    curve = 1.055 * linear.clamp_min(0.0).pow(1.0 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curve, 12.92 * linear).clamp_(0.0, 1.0)


def _mixed(channels: Tensor, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    first, second, third = channels.unbind(1)
    mixed = [first * row[0] + second * row[1] + third * row[2] for row in rows]
    return torch.stack(mixed, dim=1)


def _statistics(lab: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population spread of each channel of each frame, (B, 3, N, 1, 1)."""
    spread, mean = torch.std_mean(lab, dim=(3, 4), correction=0, keepdim=True)
    return mean, spread
