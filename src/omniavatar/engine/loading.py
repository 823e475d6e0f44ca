"""Loads the models of a configuration, from files or as random weights of the same sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from omniavatar.accel.decoder import DECODERS, DecoderSource, apply_decoder, tiny_vae
from omniavatar.accel.offload import streamed_blocks
from omniavatar.checkpoint.dit import DiTFiles, LoraFile, load_dit, random_dit
from omniavatar.checkpoint.vae import load_vae, random_vae
from omniavatar.encoders.audio import AudioEncoder
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import VAEConfig
from omniavatar.plan.preview import model_spec

if TYPE_CHECKING:
    from omniavatar.checkpoint.dit import WeightForm
    from omniavatar.config.schema import ModelConfig
    from omniavatar.model.attention import AttentionFn
    from omniavatar.model.dit import WanDiT
    from omniavatar.model.sizes import DiTConfig
    from omniavatar.model.vae import VideoVAE, WanVAE


def load_model_vae(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, run: Callable[[WanVAE], VideoVAE]
) -> VideoVAE:
    """The VAE of a model, with the decoder that `model.decoder` names.

    run: makes a runner from loaded weights (`accel.vae_runners.create_vae`).
    """
    random = model.weights == "random"
    if model.latent_encoder == "taehv":
        sizes = model_spec(model).vae if random else VAEConfig()
        return tiny_vae(None if random else model.decoder_path, sizes, dtype, device)
    if random:
        full = random_vae(model_spec(model).vae, dtype=dtype, device=device, seed=0)
    else:
        assert model.vae_path is not None
        full = load_vae(model.vae_path, dtype=dtype, device=device)
    vae = run(full)
    backend = DECODERS.get(model.decoder)
    assert random or backend.file is None or model.decoder_path is not None
    source = DecoderSource(None if random else model.decoder_path, full.config, dtype, device, run)
    decoder = backend.create(source)
    return vae if decoder is None else apply_decoder(vae, decoder)


def dit_files(model: ModelConfig) -> DiTFiles:
    """The files that the configured DiT is merged from."""
    return DiTFiles(
        model.dit_path,
        adapter=model.exp_path,
        loras=[LoraFile(lora.path, lora.strength) for lora in model.loras],
        projector=model.audio_proj_path,
        num_heads=model.dit_config.num_heads,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
    )


def loading_device(layers: int, resident: int, device: torch.device) -> Callable[[str], torch.device]:
    """A function from a tensor's key to its device: host memory for blocks that will be streamed."""
    streamed = set(streamed_blocks(layers, resident))

    def device_of(key: str) -> torch.device:
        match = re.match(r"blocks\.(\d+)\.", key)
        return torch.device("cpu") if match and int(match[1]) in streamed else device

    return device_of


def load_dit_weights(
    model: ModelConfig,
    sizes: DiTConfig,
    attention: AttentionFn,
    dtype: torch.dtype,
    device: torch.device,
    form: WeightForm | None,
    device_of: Callable[[str], torch.device],
    note: Callable[[str], None] = lambda text: None,
) -> WanDiT:
    """The DiT with its adapter and LoRAs merged, or one with random weights.

    - form: converts weights while they are read (quantised layers).
    - device_of: the device of a tensor, by its key.
    - note: called with a sentence on layers of the files that the model does not use.
    """
    if model.weights == "random":
        return random_dit(
            sizes, attention=attention, dtype=dtype, device=device, seed=0, form=form, device_of=device_of
        )
    return load_dit(
        dit_files(model),
        attention=attention,
        dtype=dtype,
        device=device,
        form=form,
        device_of=device_of,
        note=note,
    )


def load_audio_encoder(model: ModelConfig, sizes: DiTConfig, device: torch.device) -> AudioEncoder:
    """wav2vec 2.0, always in float32: its features are normalised, small and cheap to compute.

    Raises CheckpointError if it does not give the numbers a frame that the DiT takes.
    """
    if model.weights == "random":
        spec = model_spec(model).wav2vec
        encoder = AudioEncoder.random(
            hidden=spec.hidden,
            layers=spec.num_layers,
            heads=spec.num_heads,
            intermediate=spec.ffn,
            conv_dim=spec.conv_dim,
            device=device,
            seed=0,
        )
    else:
        assert model.wav2vec_path is not None
        encoder = AudioEncoder.load(model.wav2vec_path, device)
    width = encoder.layers_width if sizes.audio_tokens else encoder.width
    if width != sizes.audio_dim:
        raise CheckpointError(
            f"{model.wav2vec_path}: gives {width} numbers a frame, but the DiT's audio_proj takes "
            f"{sizes.audio_dim}; use the wav2vec folder the checkpoint was trained with"
        )
    return encoder
