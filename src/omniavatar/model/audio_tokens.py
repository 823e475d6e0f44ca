"""How audio enters a DiT without text: a few tokens for each latent frame, which cross-attention sees.

A frame hears a window of five feature rows, its own in the middle. Latent 0 takes the window of frame 0.
Latent k >= 1 covers frames 4k-3 to 4k and takes eight rows: the first three of its first frame's window, the
middle ones of the two frames between, the last three of its last frame's. A projector of four layers makes
the tokens. The tokens of a latent frame in the picture attend to that frame's audio tokens only.
Source: SoulX-FlashHead (its inference code). Shapes: B batch, N video frames = 4T-3, T latent frames, W rows
of a window, D numbers of a row, S audio tokens a latent frame, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.model.attention import AttentionFn
from omniavatar.model.sizes import FRAMES_PER_LATENT, LATENT_ROWS, WINDOW_ROWS

LATER_PICKS = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 3), (3, 4))
"""For a latent after the first: frame among its four, and row of that frame's window."""
NORM_EPS = 1e-5


class AudioTokens(nn.Module):
    """Windows (B, 4T-3, W, D) of a clip's frames to tokens (B, T, S, C)."""

    def __init__(self, audio_dim: int, hidden: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj1 = nn.Linear(WINDOW_ROWS * audio_dim, hidden)
        self.proj1_vf = nn.Linear(LATENT_ROWS * audio_dim, hidden)
        self.proj2 = nn.Linear(hidden, hidden)
        self.proj3 = nn.Linear(hidden, tokens * dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, windows_BNWD: Tensor) -> Tensor:
        weight = self.proj1.weight
        windows_BNWD = windows_BNWD.to(device=weight.device, dtype=weight.dtype)
        first = self.proj1(windows_BNWD[:, :1].flatten(2))
        later = self.proj1_vf(later_rows(windows_BNWD).flatten(2))
        hidden = F.relu(torch.cat([first, later], dim=1))
        tokens = self.proj3(F.relu(self.proj2(hidden))).unflatten(-1, (self.tokens, -1))
        out: Tensor = self.norm(tokens)
        return out


def later_rows(windows_BNWD: Tensor) -> Tensor:
    """Rows (B, T-1, 8, D) of the latents after the first."""
    latents = windows_BNWD[:, 1:].unflatten(1, (-1, FRAMES_PER_LATENT))
    return torch.stack([latents[:, :, frame, row] for frame, row in LATER_PICKS], dim=2)


class AttentionByFrame:
    """Attention of each latent frame's tokens to that frame's keys only.

    - keys: of one latent frame.
    """

    def __init__(self, attention: AttentionFn, keys: int) -> None:
        self.attention, self.keys = attention, keys

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        frames = k_BSHD.shape[1] // self.keys
        q, k, v = (each.unflatten(1, (frames, -1)).flatten(0, 1) for each in (q_BLHD, k_BSHD, v_BSHD))
        return self.attention(q, k, v).unflatten(0, (-1, frames)).flatten(1, 2)
