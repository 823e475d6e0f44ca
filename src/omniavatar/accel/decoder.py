"""Picture decoders by name: what turns latents into pixels in place of the full VAE.

Encoding stays the full VAE's: the hand-over between windows encodes the pixels of any decoder.
A smaller decoder loses detail, and the next window starts from what it blurred. By the publishers'
comparisons lightvae loses least. Sources: github.com/madebyollin/taehv, github.com/ModelTC/LightX2V.

`create` takes a `DecoderSource` and returns a `VideoDecoder`, None for the full VAE's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from omniavatar.device import Backend, Registry

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from omniavatar.checkpoint.layout import Shape
    from omniavatar.model.sizes import VAEConfig
    from omniavatar.model.vae import DecodeMore, VideoDecoder, VideoVAE, WanVAE

VAE_PAST = 38
"""Latents that the VAE's causal convolutions reach back: 24 at the latents' rate, others at higher rates."""
TINY_PAST = 8
"""The same for TAEHV: three memory blocks at each of three stages, the last one with two frames a latent."""


@dataclass(frozen=True)
class DecoderSource:
    """What a decoder is made from.

    - path: its file; None makes random weights.
    - full: sizes of the full VAE.
    - run: runs a loaded VAE as `vae` says (`accel.vae_runners.create_vae`).
    """

    path: Path | None
    full: VAEConfig
    dtype: torch.dtype
    device: torch.device
    run: Callable[[WanVAE], VideoVAE]


def _no_tensors(full: VAEConfig) -> Iterable[tuple[str, Shape]]:
    return ()


@dataclass(frozen=True, kw_only=True)
class PictureDecoder(Backend):
    """A decoder.

    - file: the released file that `decoder_path` names; None: no file is needed.
    - tensors: names and shapes of its weights beside a full VAE of these sizes, to count their memory.
    - shares_rows: the GPUs of one video can share its pictures' rows.
    - past_latents: how many latents before it a latent's pixels depend on, at most.
    """

    file: str | None = None
    tensors: Callable[[VAEConfig], Iterable[tuple[str, Shape]]] = _no_tensors
    shares_rows: bool = False
    past_latents: int = VAE_PAST


def _full(source: DecoderSource) -> None:
    return None


def _light_vae(source: DecoderSource) -> VideoDecoder:
    from omniavatar.checkpoint.tiny_decoder import light_vae_config
    from omniavatar.checkpoint.vae import load_vae, random_vae
    from omniavatar.errors import CheckpointError

    dtype, device = source.dtype, source.device
    if source.path is None:
        return source.run(random_vae(light_vae_config(source.full), dtype=dtype, device=device, seed=1))
    light = load_vae(source.path, dtype=dtype, device=device)
    if light.config.z_dim != source.full.z_dim:
        raise CheckpointError(
            f"{source.path}: decodes latents of {light.config.z_dim} channels, "
            f"not {source.full.z_dim}; use the file for Wan 2.1"
        )
    return source.run(light)


def _tiny(raw_latents: bool) -> Callable[[DecoderSource], VideoDecoder]:
    def create(source: DecoderSource) -> VideoDecoder:
        from omniavatar.checkpoint.tiny_decoder import (
            load_tiny_decoder,
            random_tiny_decoder,
            tiny_decoder_config,
        )

        dtype, device = source.dtype, source.device
        if source.path is None:
            config = replace(tiny_decoder_config(source.full), raw_latents=raw_latents)
            return random_tiny_decoder(config, dtype=dtype, device=device, seed=1)
        return load_tiny_decoder(
            source.path, raw_latents=raw_latents, z_dim=source.full.z_dim, dtype=dtype, device=device
        )

    return create


def _light_vae_tensors(full: VAEConfig) -> Iterable[tuple[str, Shape]]:
    from omniavatar.checkpoint.layout_vae import vae_tensors
    from omniavatar.checkpoint.tiny_decoder import light_vae_config

    return vae_tensors(light_vae_config(full))


def _tiny_tensors(full: VAEConfig) -> Iterable[tuple[str, Shape]]:
    from omniavatar.checkpoint.tiny_decoder import tiny_decoder_config, tiny_decoder_tensors

    return tiny_decoder_tensors(tiny_decoder_config(full))


DECODERS: Registry[PictureDecoder] = Registry(
    "model.decoder",
    PictureDecoder(
        name="full", create=_full, exact=True, doc="The decoder of the VAE itself.", shares_rows=True
    ),
    PictureDecoder(
        name="lightvae",
        create=_light_vae,
        exact=False,
        doc="The full VAE with a quarter of the channels (lightx2v/Autoencoders): softer.",
        file="lightvaew2_1.pth",
        tensors=_light_vae_tensors,
        shares_rows=True,
    ),
    PictureDecoder(
        name="taehv",
        create=_tiny(raw_latents=False),
        exact=False,
        doc="TAEHV (madebyollin/taehv): the fastest, softer.",
        file="taew2_1.pth",
        tensors=_tiny_tensors,
        past_latents=TINY_PAST,
    ),
    PictureDecoder(
        name="lighttae",
        create=_tiny(raw_latents=True),
        exact=False,
        doc="TAEHV on the full VAE's own latents (lightx2v/Autoencoders): the fastest, softer.",
        file="lighttaew2_1.pth",
        tensors=_tiny_tensors,
        past_latents=TINY_PAST,
    ),
)


def apply_decoder(vae: VideoVAE, decoder: VideoDecoder) -> VideoVAE:
    """`vae` that decodes with `decoder`; the weights of a `TinyDecoder` become channels-last."""
    import torch

    from omniavatar.model.tiny_decoder import TinyDecoder

    if isinstance(decoder, TinyDecoder):
        decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return OtherDecoder(vae, decoder)


class OtherDecoder:
    """Encodes with one network and decodes with another."""

    def __init__(self, vae: VideoVAE, decoder: VideoDecoder) -> None:
        self.vae, self.decoder = vae, decoder

    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents of the full VAE, see `model.vae.WanVAE.encode`."""
        return self.vae.encode(video)

    def decode_stream(self, latent: Tensor) -> Iterator[Tensor]:
        """Pixels of the other decoder, see `model.vae.WanVAE.decode_stream`."""
        return self.decoder.decode_stream(latent)

    def begin_clip(self) -> DecodeMore:
        """See `model.vae.WanVAE.begin_clip`."""
        return self.decoder.begin_clip()


def tiny_vae(path: Path | None, full: VAEConfig, dtype: torch.dtype, device: torch.device) -> VideoVAE:
    """TAEHV in both directions, without the full VAE; its weights become channels-last.

    path: its file; None makes random weights that fit a full VAE of the sizes `full`.
    """
    import torch

    from omniavatar.checkpoint.tiny_decoder import (
        load_tiny_decoder,
        load_tiny_encoder,
        random_tiny_decoder,
        random_tiny_encoder,
        tiny_decoder_config,
    )
    from omniavatar.model.tiny_encoder import TinyVAE

    if path is None:
        config = tiny_decoder_config(full)
        decoder = random_tiny_decoder(config, dtype=dtype, device=device, seed=1)
        encoder = random_tiny_encoder(config.widths[-1], config.z_dim, dtype=dtype, device=device, seed=2)
    else:
        decoder = load_tiny_decoder(path, raw_latents=False, z_dim=full.z_dim, dtype=dtype, device=device)
        encoder = load_tiny_encoder(path, z_dim=full.z_dim, dtype=dtype, device=device)
    for half in (encoder, decoder):
        half.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TinyVAE(encoder, decoder)


def tiny_vae_tensors(full: VAEConfig) -> Iterable[tuple[str, Shape]]:
    """Names and shapes of both halves of TAEHV beside a full VAE of these sizes."""
    from omniavatar.checkpoint.tiny_decoder import tiny_decoder_config, tiny_encoder_tensors

    config = tiny_decoder_config(full)
    yield from _tiny_tensors(full)
    yield from tiny_encoder_tensors(config.widths[-1], config.z_dim)
