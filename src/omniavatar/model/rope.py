"""Rotary positions over time, height and width, as in Wan 2.1.

A head of size d has `d - 4*(d//6)`, `2*(d//6)` and `2*(d//6)` channels for the three axes; pairs are
interleaved (channels 2i and 2i+1 are rotated together). Angles are computed in float64, the table and the
rotation in float32: equal to the original's complex128 within float32 rounding.
Source: Wan 2.1 (arXiv 2503.20314), RoPE (arXiv 2104.09864).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RopeTable:
    """cos and sin, each (L, D/2) float32, for L tokens in time-major, then row, then column order."""

    cos: Tensor
    sin: Tensor


def _angles(positions: Tensor, channels: int) -> Tensor:
    exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device) / channels
    return torch.outer(positions.to(torch.float64), 10000.0**-exponents)


def rope_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, first_frame: int = 0
) -> RopeTable:
    """Table for a grid of (T, h, w) tokens whose first latent frame has time `first_frame`."""
    frames, rows, columns = grid
    spatial = 2 * (head_dim // 6)
    temporal = head_dim - 2 * spatial
    time = _angles(torch.arange(first_frame, first_frame + frames, device=device), temporal)
    row = _angles(torch.arange(rows, device=device), spatial)
    column = _angles(torch.arange(columns, device=device), spatial)
    angles = torch.cat(
        [
            time[:, None, None, :].expand(frames, rows, columns, -1),
            row[None, :, None, :].expand(frames, rows, columns, -1),
            column[None, None, :, :].expand(frames, rows, columns, -1),
        ],
        dim=-1,
    ).reshape(frames * rows * columns, -1)
    return RopeTable(angles.cos().float(), angles.sin().float())


def rotate(x_BLHD: Tensor, table: RopeTable) -> Tensor:
    """Heads (B, L, H, D) rotated in float32, in the dtype of x."""
    even, odd = x_BLHD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.cos[:, None, :], table.sin[:, None, :]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_BLHD.dtype)
