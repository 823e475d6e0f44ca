"""Loads the halves of a TAEHV file (`taew2_1.pth`, `lighttaew2_1.pth`, or safetensors with their names)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from omniavatar.checkpoint.initial import fill_random
from omniavatar.checkpoint.layout import Shape
from omniavatar.checkpoint.outside import fitting
from omniavatar.checkpoint.reader import PathLike, TensorFiles
from omniavatar.checkpoint.strict import file_sources, load_strict
from omniavatar.errors import CheckpointError
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from omniavatar.model.tiny_encoder import STRIDES, TinyEncoder

RELEASED_VAE_DIM = 96
LIGHT_DIVISOR = 4
SMALLEST_WIDTH = 8


def load_tiny_decoder(
    path: PathLike, *, raw_latents: bool, z_dim: int, dtype: torch.dtype, device: torch.device | str
) -> TinyDecoder:
    """The decoder on `device`, without gradients. Its sizes come from the shapes; the encoder is not loaded.

    Raises CheckpointError if the file is missing, damaged or does not fit.
    """
    with TensorFiles(path) as files:
        with fitting(files.origin, "use taew2_1.pth"), torch.device("meta"):
            model = TinyDecoder(replace(_config(files, z_dim), raw_latents=raw_latents))
        sources = file_sources(files, lambda key: None if key.startswith("encoder.") else key)
        load_strict(model, sources, dtype=dtype, device=device, origin=files.origin)
    return model.eval()


def random_tiny_decoder(
    config: TinyDecoderConfig, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> TinyDecoder:
    """A decoder with random weights made on `device` (see `initial`)."""
    with torch.device("meta"):
        model = TinyDecoder(config)
    fill_random(model, dtype=dtype, device=device, seed=seed)
    return model.eval()


def load_tiny_encoder(
    path: PathLike, *, z_dim: int, dtype: torch.dtype, device: torch.device | str
) -> TinyEncoder:
    """The encoder half on `device`, without gradients. Its width comes from the shapes.

    Raises CheckpointError if the file is missing, damaged or does not fit.
    """
    with TensorFiles(path) as files:
        first = "encoder.0.weight"
        if first not in files or len(files.shape(first)) != 4:
            raise CheckpointError(
                f"{files.origin}: has no {first}, so it is no TAEHV with an encoder; use taew2_1.pth"
            )
        with fitting(files.origin, "use taew2_1.pth"), torch.device("meta"):
            model = TinyEncoder(files.shape(first)[0], z_dim)
        sources = file_sources(files, lambda key: None if key.startswith("decoder.") else key)
        load_strict(model, sources, dtype=dtype, device=device, origin=files.origin)
    return model.eval()


def random_tiny_encoder(
    width: int, z_dim: int, *, dtype: torch.dtype, device: torch.device | str, seed: int
) -> TinyEncoder:
    """An encoder with random weights made on `device` (see `initial`)."""
    with torch.device("meta"):
        model = TinyEncoder(width, z_dim)
    fill_random(model, dtype=dtype, device=device, seed=seed)
    return model.eval()


def tiny_encoder_tensors(width: int, z_dim: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the encoder half of a file."""
    yield from _conv("encoder.0", width, 3)
    number = 2
    for stride in STRIDES:
        yield f"encoder.{number}.conv.weight", (width, stride * width, 1, 1)
        yield f"encoder.{number + 1}.weight", (width, width, 3, 3)
        for block in range(number + 2, number + 5):
            yield from _memory_block(f"encoder.{block}", width)
        number += 5
    yield from _conv(f"encoder.{number}", z_dim, width)


def light_vae_config(vae: VAEConfig) -> VAEConfig:
    """Sizes of the LightVAE that fits a full VAE: a quarter of its channels."""
    return replace(vae, dim=max(SMALLEST_WIDTH, vae.dim // LIGHT_DIVISOR))


def tiny_decoder_config(vae: VAEConfig) -> TinyDecoderConfig:
    """Sizes of the TAEHV that fits a full VAE: the released sizes, scaled down for a smaller VAE."""
    first, second, third, last = (
        max(SMALLEST_WIDTH, width * vae.dim // RELEASED_VAE_DIM) for width in TinyDecoderConfig().widths
    )
    return TinyDecoderConfig((first, second, third, last), vae.z_dim)


def tiny_decoder_tensors(config: TinyDecoderConfig) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the decoder half of a file, from its sizes (see `layout`)."""
    widths = config.widths
    yield from _conv("decoder.1", widths[0], config.z_dim)
    number = 3
    for width, following, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
        for block in range(number, number + 3):
            yield from _memory_block(f"decoder.{block}", width)
        yield f"decoder.{number + 4}.conv.weight", (stride * width, width, 1, 1)
        yield f"decoder.{number + 5}.weight", (following, width, 3, 3)
        number += 6
    yield from _conv("decoder.22", 3, widths[3])


def _memory_block(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _conv(f"{name}.conv.0", width, 2 * width)
    yield from _conv(f"{name}.conv.2", width, width)
    yield from _conv(f"{name}.conv.4", width, width)


def _conv(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs, 3, 3)
    yield f"{name}.bias", (outputs,)


def _config(files: TensorFiles, z_dim: int) -> TinyDecoderConfig:
    """Widths from the convolutions between the stages."""
    links = [f"decoder.{number}.weight" for number in (1, 8, 14, 20)]
    if any(key not in files or len(files.shape(key)) != 4 for key in links):
        raise CheckpointError(
            f"{files.origin}: has no {', '.join(links)}, so it is not a TAEHV decoder; "
            "for a Wan VAE with fewer channels, set decoder=lightvae"
        )
    channels = files.shape(links[0])[1]
    if channels != z_dim:
        raise CheckpointError(
            f"{files.origin}: decodes latents of {channels} channels, not {z_dim}; use the file for Wan 2.1"
        )
    first, second, third, last = (files.shape(key)[0] for key in links)
    return TinyDecoderConfig((first, second, third, last), z_dim)
