"""Our DiT and VAE against diffusers' independent implementations, on tiny random weights, float32, CPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)

from omniavatar.accel.attention.registry import create_attention
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import DiTConfig, VAEConfig
from omniavatar.model.vae import LATENT_MEAN, LATENT_STD, WanVAE

TOLERANCE = 1e-5


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        base = 1.0 if parameter.ndim == 1 and parameter.min() == 1 else 0.0
        parameter.data = base + noise * scale


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    ("heads", "head_dim", "layers", "shape"),
    [(2, 32, 3, (3, 8, 6)), (3, 128, 2, (2, 4, 10)), (1, 44, 4, (1, 6, 6))],
)
@torch.inference_mode()
def test_transformer(heads, head_dim, layers, shape):
    _, attention = create_attention("sdpa", torch.device("cpu"), torch.float32)
    config = DiTConfig(
        dim=heads * head_dim, ffn_dim=80, num_heads=heads, num_layers=layers, in_dim=16, text_dim=24,
        freq_dim=32, audio_dim=0,
    )  # fmt: skip
    ours = WanDiT(config, attention).eval()
    randomise(ours, 0)
    theirs = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, in_channels=16, out_channels=16, text_dim=24,
        freq_dim=32, ffn_dim=80, num_layers=layers, cross_attn_norm=True, eps=1e-6,
    ).eval()  # fmt: skip
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(ours.state_dict())))
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 16, *shape, generator=generator)
    context = torch.randn(2, 7, 24, generator=generator)
    timestep = torch.tensor([937.0, 12.0])
    output = ours(sample, None, timestep, ours.prepare_text(context), ours.prepare_audio(None))
    expected = theirs(sample, timestep, context, return_dict=False)[0]
    assert error(output, expected) <= TOLERANCE


@torch.inference_mode()
def test_vae():
    ours = WanVAE(VAEConfig(dim=8)).eval()
    randomise(ours, 2)
    theirs = AutoencoderKLWan(base_dim=8, z_dim=16).eval()
    theirs.load_state_dict(convert_wan_vae_to_diffusers(dict(ours.state_dict())))
    video = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))

    latent = ours.encode(video)
    expected = (theirs.encode(video).latent_dist.mode() - mean) / std
    assert error(latent, expected) <= TOLERANCE

    small = latent / latent.abs().max() * 0.1
    decoded = ours.decode(small)
    assert error(decoded.clamp(-1, 1), theirs.decode(small * std + mean, return_dict=False)[0]) <= TOLERANCE
    assert decoded.abs().max() > 0.01
