"""The prompt without its padding gives the same velocity; the long way is the twin."""

import pytest
import torch

from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.short_text import WeightedKeys, apply_short_text, prepare_text
from omniavatar.checkpoint.dit import random_dit
from omniavatar.model.sizes import DiTConfig

CPU = torch.device("cpu")
CONFIG = DiTConfig(dim=48, ffn_dim=96, num_heads=4, num_layers=2, text_dim=12, audio_dim=0)


@pytest.fixture(scope="module")
def dits():
    """Two equal models, the second with short text."""
    attention = create_attention("sdpa", CPU, torch.float32)[1]
    plain, short = (
        random_dit(CONFIG, attention=attention, dtype=torch.float32, device=CPU, seed=0) for _ in range(2)
    )
    apply_short_text(short)
    return plain, short


@pytest.mark.parametrize("words", [0, 1, 7, 63, 64])
@torch.inference_mode()
def test_velocity_is_the_same(dits, words):
    generator = torch.Generator().manual_seed(words)
    embedding = torch.zeros(1, 64, CONFIG.text_dim)
    embedding[:, :words] = 2 * torch.randn(1, words, CONFIG.text_dim, generator=generator)
    sample, y = (torch.randn(1, channels, 2, 8, 8, generator=generator) for channels in (16, 17))
    velocities = []
    for dit in dits:
        text = prepare_text(dit, embedding)
        short = isinstance(dit.text_attention, WeightedKeys) and words < 63
        assert text[0][0].shape[1] == text[0][1].shape[1] == (words + 1 if short else 64)
        velocities.append(dit(sample, y, torch.tensor([700.0]), text, dit.prepare_audio(None)))
    assert (velocities[0] - velocities[1]).abs().max() <= 2e-6 * velocities[0].abs().max()


@torch.inference_mode()
def test_plain_keys_pass_through(dits):
    plain, short = dits
    q, k, v = (torch.randn(1, tokens, 4, 12) for tokens in (5, 9, 9))
    assert torch.equal(short.text_attention(q, k, v), plain.text_attention(q, k, v))
