"""How audio enters the DiT: the vectors of four frames are packed into one small vector a latent frame.

The causal VAE codes the first frame alone, then four frames in each latent. So the first audio vector is
repeated three times in front, and latent k takes the vectors 4k..4k+3 of the padded sequence. In each of the
blocks 2..layers//2 one linear layer turns the packed vector into what is added to every token of that latent
frame.
Source: OmniAvatar (arXiv 2506.18866). Shapes: B batch, N video frames = 4T-3, T latent frames, D audio width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omniavatar.model.sizes import FRAMES_PER_LATENT


class AudioPack(nn.Module):
    """(B, 4T-3, D) -> (B, T, hidden): a linear layer over four concatenated vectors, then layer norm.

    With `continued` there are 4T vectors, which follow those of earlier latents: none is repeated.
    """

    def __init__(self, audio_dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(FRAMES_PER_LATENT * audio_dim, hidden)
        self.norm_out = nn.LayerNorm(hidden)

    def forward(self, audio_BND: Tensor, continued: bool = False) -> Tensor:
        if not continued:
            audio_BND = torch.cat([audio_BND[:, :1].expand(-1, FRAMES_PER_LATENT - 1, -1), audio_BND], dim=1)
        packed = audio_BND.unflatten(1, (-1, FRAMES_PER_LATENT)).flatten(-2)
        weight = self.proj.weight
        out: Tensor = self.norm_out(self.proj(packed.to(weight.dtype)).to(self.norm_out.weight.dtype))
        return out
