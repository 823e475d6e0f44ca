"""Every decoder gives a clip's frames in pieces as it gives them at once, wherever the clip is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from omniavatar.accel.decoder import apply_decoder
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.checkpoint.vae import random_vae
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from omniavatar.parallel.vae import apply_shared_vae

CUTS = [(8,), (3, 3, 2), (1,) * 8, (2, 5, 1)]


def vae(at_once: int, float8: bool = False) -> Any:
    plain = random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=0)
    return apply_fast_vae(plain, FastVAEConfig("eager", latents_at_once=at_once, float8=float8))


def tiny(at_once: int) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(TinyDecoderConfig(latents_at_once=at_once, widths=(16, 8, 8, 8))).requires_grad_(False)


DECODERS = {
    "plain": lambda _: random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=0),
    "fast": vae,
    "fp8": lambda at_once: vae(at_once, float8=True),
    "tiny": tiny,
    "other": lambda at_once: apply_decoder(vae(at_once), tiny(at_once)),
    "shared": lambda at_once: apply_shared_vae(vae(at_once), lambda rows: None),
}


def random(batch: int) -> Tensor:
    return torch.randn(batch, 16, 8, 4, 6, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def decoded(decoder: Any, latent: Tensor, cuts: tuple[int, ...]) -> Tensor:
    clip, pieces = decoder.begin_clip(), []
    for piece in latent.split(list(cuts), dim=2):
        pieces += list(clip(piece))
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("cuts", CUTS)
def test_one_latent_in_a_pass_gives_the_same_bits(name: str, cuts: tuple[int, ...]) -> None:
    decoder, latent = DECODERS[name](1), random(2)
    with torch.inference_mode():
        whole = torch.cat(list(decoder.decode_stream(latent)), dim=2)
    assert whole.shape[2] == 29
    assert torch.equal(decoded(decoder, latent, cuts), whole)


@pytest.mark.parametrize("name", ["fast", "tiny", "shared"])
def test_several_latents_in_a_pass_change_rounding_only(name: str) -> None:
    decoder, latent = DECODERS[name](3), random(1)
    with torch.inference_mode():
        whole = torch.cat(list(decoder.decode_stream(latent)), dim=2)
    for cuts in CUTS:
        torch.testing.assert_close(decoded(decoder, latent, cuts), whole, rtol=0, atol=1e-5)


def test_clips_do_not_mix() -> None:
    decoder, latent = vae(1), random(2)
    with torch.inference_mode():
        first, second = decoder.begin_clip(), decoder.begin_clip()
        pieces = [
            [torch.cat(list(clip(piece)), dim=2) for clip, piece in zip((first, second), pair, strict=True)]
            for pair in zip(latent[:1].split(2, dim=2), latent[1:].split(2, dim=2), strict=True)
        ]
        expected = torch.cat(list(decoder.decode_stream(latent)), dim=2)
    made = torch.cat([torch.cat([a for a, _ in pieces], 2), torch.cat([b for _, b in pieces], 2)])
    assert torch.equal(made, expected)
