"""This package: its default backends; with `:fp8` float8 layers and attention, with `:plain` no optimisation.

The transformer has audio layers and 33 input channels, which the public Wan models lack.
"""

from __future__ import annotations

import torch

from benchmarks.engines.adapter import ENCODED_FRAMES, Parts, Sizes
from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.vae_runners import choose_vae, create_vae
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.vae import random_vae

PACKAGES = ("omniavatar", "torch", "triton", "fa3-fwd")
OPTIONS = ("", "plain", "fp8")


def build(sizes: Sizes, option: str) -> Parts:
    """Forward, decode and encode. Raises ValueError for an unknown option."""
    if option not in OPTIONS:
        raise ValueError(f"{option!r} is no option of ours; use plain or fp8")
    device, dtype, spec = sizes.torch_device, sizes.torch_dtype, sizes.spec
    name = "auto"
    if option == "fp8" and "fa3_fp8" in ATTENTION.available(device):
        name = "fa3_fp8"
    attention = create_attention(name, device, dtype)[1]
    dit = random_dit(spec.dit, attention=attention, dtype=dtype, device=device, seed=0)
    if option != "plain":
        quantize = "fp8" if option == "fp8" else "none"
        apply_accelerations(dit, AccelConfig(quantize, device.type == "cuda"), create_fused(device))
    vae = random_vae(spec.vae, dtype=dtype, device=device, seed=0)
    running = create_vae("plain" if option == "plain" else choose_vae("auto", device), vae, device)
    latent, frames = sizes.latent, 4 * sizes.latent[0] - 3
    sample, y = sizes.noise(1, 16, *latent), sizes.noise(1, 17, *latent)
    clip = sizes.noise(1, 3, ENCODED_FRAMES, *sizes.pixels).clamp_(-1, 1)
    time = torch.tensor([800.0], device=device)
    text = dit.prepare_text(sizes.noise(1, 512, spec.dit.text_dim))
    audio = dit.prepare_audio(sizes.noise(1, frames, spec.dit.audio_dim) if spec.dit.audio_dim else None)
    return {
        "forward": lambda: dit(sample, y, time, text, audio),
        "decode": lambda: list(running.decode_stream(sample)),
        "encode": lambda: running.encode(clip),
    }
