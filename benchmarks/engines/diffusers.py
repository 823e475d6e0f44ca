"""Hugging Face diffusers: its Wan transformer and VAE; with `:compile` cuDNN attention and compiled blocks.

Its transformer has 16 input channels and no audio. Needs `pip install diffusers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.engines.adapter import ENCODED_FRAMES, Parts, Sizes

PACKAGES = ("diffusers", "torch")
OPTIONS = ("", "compile")


def build(sizes: Sizes, option: str) -> Parts:
    """Forward, decode and encode. Raises ValueError for an unknown option."""
    if option not in OPTIONS:
        raise ValueError(f"{option!r} is no option of diffusers; use compile")
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    device, dtype, dit = sizes.torch_device, sizes.torch_dtype, sizes.spec.dit
    with device, _default(dtype):
        transformer = WanTransformer3DModel(
            num_attention_heads=dit.num_heads,
            attention_head_dim=dit.head_dim,
            in_channels=dit.out_dim,
            out_channels=dit.out_dim,
            text_dim=dit.text_dim,
            freq_dim=dit.freq_dim,
            ffn_dim=dit.ffn_dim,
            num_layers=dit.num_layers,
            cross_attn_norm=True,
            eps=dit.eps,
        )
        vae = AutoencoderKLWan(base_dim=sizes.spec.vae.dim, z_dim=sizes.spec.vae.z_dim)
    transformer.eval()
    vae.eval()
    if option == "compile":
        transformer.set_attention_backend("_native_cudnn")
        transformer.compile_repeated_blocks(dynamic=False)
    sample = sizes.noise(1, 16, *sizes.latent).to(dtype)
    clip = sizes.noise(1, 3, ENCODED_FRAMES, *sizes.pixels).clamp_(-1, 1).to(dtype)
    text, time = sizes.noise(1, 512, dit.text_dim).to(dtype), torch.tensor([800.0], device=device)
    return {
        "forward": lambda: transformer(sample, time, text, return_dict=False)[0],
        "decode": lambda: vae.decode(sample, return_dict=False)[0],
        "encode": lambda: vae.encode(clip).latent_dist.mode(),
    }


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make weights in `dtype` at once: in float32 the 14B would not fit beside its copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
