"""Smaller decoders on CUDA against the CPU, in float32 and in bf16."""

from __future__ import annotations

import pytest
import torch

from omniavatar.accel.decoder import apply_decoder
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.tiny_decoder import light_vae_config, random_tiny_decoder
from omniavatar.checkpoint.vae import random_vae
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32():
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def decoded(decoder, latent: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([piece.cpu() for piece in decoder.decode_stream(latent)], dim=2)


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_taehv_of_released_sizes(dtype, limit, at_once):
    """The last bias moves random pixels to the middle of their range, so that few are clamped."""
    exact = random_tiny_decoder(TinyDecoderConfig(), dtype=torch.float32, device="cpu", seed=0)
    exact.decoder[22].bias.data.fill_(0.5)
    fast = TinyDecoder(TinyDecoderConfig(latents_at_once=at_once)).requires_grad_(False)
    fast.load_state_dict(exact.state_dict())
    vae = random_vae(VAEConfig(dim=8), dtype=dtype, device="cuda", seed=0)
    latent = torch.randn(1, 16, 5, 6, 8, generator=torch.Generator().manual_seed(1))
    expected = decoded(exact, latent)
    assert (expected.abs() < 1).float().mean() > 0.5
    got = decoded(apply_decoder(vae, fast.to("cuda", dtype)), latent.cuda())
    assert got.shape == (1, 3, 17, 48, 64)
    assert relative_l2(got, expected) < limit


def test_lightvae_runs_on_the_fast_path():
    """24 channels: no power of two, and fewer than a tile of the convolutions."""
    light = random_vae(light_vae_config(VAEConfig()), dtype=torch.float32, device="cuda", seed=0)
    latent = torch.randn(1, 16, 5, 6, 8, device="cuda")
    plain = decoded(light, latent)
    assert relative_l2(decoded(apply_fast_vae(light, FastVAEConfig()), latent), plain) < 1e-4
