"""Compares recordings, and builds the models they describe."""

from __future__ import annotations

import json

import torch

from omniavatar.accel.attention.registry import create_attention
from omniavatar.model.dit import WanDiT
from omniavatar.model.sizes import DiTConfig, VAEConfig
from omniavatar.model.vae import WanVAE


def relative_error(value: torch.Tensor, recorded: torch.Tensor) -> float:
    """Largest difference divided by the largest value of the recording; shapes must be equal."""
    assert value.shape == recorded.shape
    return ((value.float() - recorded.float()).abs().max() / recorded.abs().max()).item()


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose key starts with `prefix`, without the prefix."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def dit_config(config: dict, weights: dict[str, torch.Tensor]) -> DiTConfig:
    proj = weights["audio_proj.proj.weight"]
    return DiTConfig(
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        in_dim=config["in_dim"],
        out_dim=config["out_dim"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        eps=config["eps"],
        patch_size=tuple(config["patch_size"]),
        audio_dim=proj.shape[1] // 4,
        audio_hidden=proj.shape[0],
    )


def build_dit(metadata: dict[str, str], weights: dict[str, torch.Tensor]) -> WanDiT:
    _, attention = create_attention("sdpa", torch.device("cpu"), torch.float32)
    dit = WanDiT(dit_config(json.loads(metadata["config"]), weights), attention)
    dit.load_state_dict(weights)
    return dit.eval()


def build_vae(metadata: dict[str, str], weights: dict[str, torch.Tensor]) -> WanVAE:
    config = json.loads(metadata["config"])
    vae = WanVAE(
        VAEConfig(
            config["dim"],
            config["z_dim"],
            tuple(config["dim_mult"]),
            config["num_res_blocks"],
            tuple(config["temporal_downsample"]),
        )
    )
    vae.load_state_dict(weights)
    return vae.eval()
