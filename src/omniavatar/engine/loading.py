"""The video VAE a configuration names, with the decoder it names, from files or of random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from omniavatar.checkpoint.dit import DiTFiles, LoraFile

if TYPE_CHECKING:
    from omniavatar.config.schema import ModelConfig

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from omniavatar.accel.decoder import apply_decoder
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.tiny_decoder import (
    light_vae_config,
    load_tiny_decoder,
    random_tiny_decoder,
    tiny_decoder_config,
)
from omniavatar.checkpoint.vae import load_vae, random_vae
from omniavatar.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from omniavatar.config.schema import ModelConfig
    from omniavatar.model.vae import VAEConfig, VideoDecoder, VideoVAE, WanVAE


class VAELoader:
    """Loads a model's VAE. run: what runs loaded weights (`accel.vae.create_vae`)."""

    def __init__(
        self, model: ModelConfig, dtype: torch.dtype, device: torch.device, run: Callable[[WanVAE], VideoVAE]
    ) -> None:
        self._model, self._dtype, self._device, self._run = model, dtype, device, run

    def load(self) -> VideoVAE:
        """The VAE with the decoder that `model.decoder` names."""
        model = self._model
        if model.weights == "random":
            full = random_vae(scale_spec(model.scale).vae, dtype=self._dtype, device=self._device, seed=0)
        else:
            assert model.vae_path is not None
            full = load_vae(model.vae_path, dtype=self._dtype, device=self._device)
        vae = self._run(full)
        return vae if model.decoder == "full" else apply_decoder(vae, self._load_decoder(full.config))

    def _load_decoder(self, full: VAEConfig) -> VideoDecoder:
        """The smaller decoder that stands in for the full VAE's."""
        model, dtype, device = self._model, self._dtype, self._device
        raw = model.decoder == "lighttae"
        if model.weights == "random":
            if model.decoder == "lightvae":
                return self._run(random_vae(light_vae_config(full), dtype=dtype, device=device, seed=1))
            config = replace(tiny_decoder_config(full), raw_latents=raw)
            return random_tiny_decoder(config, dtype=dtype, device=device, seed=1)
        assert model.decoder_path is not None
        if model.decoder == "lightvae":
            light = load_vae(model.decoder_path, dtype=dtype, device=device)
            if light.config.z_dim != full.z_dim:
                raise CheckpointError(
                    f"{model.decoder_path}: decodes latents of {light.config.z_dim} channels, "
                    f"not {full.z_dim}; use the file for Wan 2.1"
                )
            return self._run(light)
        return load_tiny_decoder(
            model.decoder_path, raw_latents=raw, z_dim=full.z_dim, dtype=dtype, device=device
        )


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dit_files(model: ModelConfig) -> DiTFiles:
    """The files the configured DiT is merged from."""
    return DiTFiles(
        model.dit_path,
        adapter=model.exp_path,
        loras=[LoraFile(lora.path, lora.strength) for lora in model.loras],
        num_heads=model.dit_config.num_heads,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
    )
