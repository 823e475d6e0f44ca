"""A text encoder of the released form, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path

import torch

from omniavatar.checkpoint.layout import TextSpec, text_tensors
from omniavatar.encoders.text import sizes_of

SPEC = TextSpec(vocab=260, dim=32, dim_ffn=48, num_heads=4, num_layers=2, dim_attn=16)
SIZES = sizes_of(dict(text_tensors(SPEC)), "test")


def write_text_encoder(folder: Path) -> Path:
    """Its weights in `folder`, under the released name."""
    generator = torch.Generator().manual_seed(0)
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(
        {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in text_tensors(SPEC)}, path
    )
    return path
