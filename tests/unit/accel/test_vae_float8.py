"""The float8 VAE: its convolution against an ordinary one, and the whole against the exact path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from omniavatar.accel.kernels.channel_norm import add_norm
from omniavatar.accel.kernels.float8_conv import (
    NormTo,
    convolve,
    halves,
    input_gain,
    joins_norm,
    kernel_rows,
    quantise_conv,
    takes_float8,
)
from omniavatar.accel.kernels.rows import FP8, FP8_MAX
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.accel.vae_runners import VAES, choose_vae
from omniavatar.assets import pocket
from omniavatar.checkpoint.vae import load_vae, random_vae
from omniavatar.config.load import load_config
from omniavatar.errors import ConfigError, ResourceError
from omniavatar.model.sizes import VAEConfig

CPU = torch.device("cpu")
EXACT = FastVAEConfig("eager", paired_columns=False)
FLOAT8 = FastVAEConfig("eager", paired_columns=False, float8=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax((1, 2, 3, 4), keepdim=True) / FP8_MAX
    return (weight / scale).to(FP8).float() * scale


@pytest.fixture(scope="module")
def coded():
    """A VAE with blocks of 8, 16 and 32 channels, inputs, and what the exact path makes of them."""
    vae = random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=0)
    video, latent = random(1, 3, 9, 32, 48).clamp(-1, 1), random(1, 16, 4, 4, 6)
    with torch.inference_mode():
        exact = apply_fast_vae(vae, EXACT)
        return vae, video, latent, exact.encode(video), exact.decode(latent)


@pytest.mark.parametrize("channels", [16, 48, 64, 96, 192, 384])
def test_rows_of_the_kernel_hold_every_weight_once(channels):
    weight = (random(channels, 32, 3, 3, 3) * 100).to(FP8)
    for padded in (False, True):
        rows = kernel_rows(weight, padded)
        assert rows.shape == ((9 * channels, 96) if padded else (27 * channels, 32))
        conv = quantise_conv(weight.float(), random(channels), 1.0, padded)
        assert relative_l2(conv.weight().float() * conv.scale.view(-1, 1, 1, 1, 1), weight) < 0.04
    # The second row holds the thread's neighbour: channel 1. The third belongs to the next thread.
    run = halves(channels)[0] // 4
    tap = kernel_rows(weight, False).view(3, 3, 3, channels, 32)[2, 0, 1].float()
    assert torch.equal(tap[[0, 1, 2, 8]], weight[[0, 1, run, 2], :, 2, 0, 1].float())


@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_convolution_is_that_of_the_rounded_numbers(padded, border):
    frames, height, width = 3, 4, 5
    weight, bias, gain = random(32, 16, 3, 3, 3), random(32, seed=1), 8.0
    inside = (F.silu(random(5, height + 2 * border, width, 16, seed=2)) * gain).to(FP8)
    window = torch.zeros(5, height + 2 * border, width + 2 * padded, 16).to(FP8)
    window.view(torch.uint8)[:, :, int(padded) : int(padded) + width] = inside.view(torch.uint8)
    residual, gamma = random(frames, height, width, 32, seed=3), random(32, seed=4)
    conv = quantise_conv(weight, bias, gain, padded)
    total = torch.empty_like(residual)
    wide = torch.full((frames, height, width + 2, 32), 9.0).to(FP8)
    convolve(
        window,
        conv,
        residual,
        border=border,
        total=total,
        norm=NormTo(gamma, wide[:, :, 1:-1], input_gain(gamma)),
    )
    taps = (inside.float() / gain).permute(3, 0, 1, 2)[None]
    sums = F.conv3d(taps, rounded_weight(weight), bias, padding=(0, int(not border), 1))[0].permute(
        1, 2, 3, 0
    )
    assert relative_l2(total, sums + residual) < 1e-5
    normed = torch.empty_like(residual)
    add_norm(
        total,
        None,
        None,
        total=None,
        gamma=gamma,
        out=normed,
        activate=True,
        phases=False,
        gain=input_gain(gamma),
    )
    assert relative_l2(wide[:, :, 1:-1], normed.to(FP8)) < 1e-3
    assert (wide.float()[:, :, [0, -1]] == 9).all()


def test_a_norm_never_leaves_the_range_of_float8():
    gamma = torch.tensor([0.3, 7.0, -2.0, 0.01] * 24)
    gain = input_gain(gamma)
    assert math.log2(gain) % 1 == 0
    alone = torch.zeros(1, 1, 1, 96)
    alone[..., 1] = 1e4  # all the root mean square in the channel with the largest gain
    out = torch.empty(1, 1, 1, 96).to(FP8)
    add_norm(alone, None, None, total=None, gamma=gamma, out=out, activate=True, phases=False, gain=gain)
    assert FP8_MAX / 2 * 0.9 < out.float().max() <= FP8_MAX
    assert input_gain(torch.zeros(16)) == 1


def test_a_program_joins_the_norm_where_it_has_all_channels():
    assert [joins_norm(channels) for channels in (16, 64, 96, 192, 384, 48)] == [True] * 4 + [False] * 2


def test_whole_vae_is_near_the_exact_one_and_independent_of_passes(coded):
    vae, video, latent, encoded, decoded = coded
    with torch.inference_mode():
        float8 = apply_fast_vae(vae, FLOAT8)
        pixels, latents = float8.decode(latent), float8.encode(video)
        assert 0.005 < relative_l2(pixels, decoded) < 0.1
        assert 0.005 < relative_l2(latents, encoded) < 0.1
        for changed in ({"latents_at_once": 1, "frames_at_once": 4}, {"padded_float8": False}):
            other = apply_fast_vae(vae, FastVAEConfig("eager", paired_columns=False, float8=True, **changed))
            assert relative_l2(other.decode(latent), pixels) < 2e-3
            assert relative_l2(other.encode(video), latents) < 2e-3
        more = float8.begin_clip()
        pieces = [piece for part in latent.split([1, 2, 1], dim=2) for piece in more(part)]
        assert relative_l2(torch.cat(pieces, 2), pixels) < 2e-3
        exact = apply_fast_vae(vae, EXACT)  # the weights of the plain modules did not change
        assert torch.equal(exact.decode(latent), decoded)


def test_blocks_with_other_channels_stay_exact():
    assert takes_float8(96, 192) and takes_float8(16, 32)
    assert not takes_float8(8, 16) and not takes_float8(16, 8)


def test_pictures_of_the_pocket_model_stay_the_same_to_the_eye():
    vae = load_vae(pocket.FOLDER / "weights" / "vae.safetensors", dtype=torch.float32, device=CPU)
    with Image.open(pocket.PORTRAIT) as picture:
        face = torch.from_numpy(np.array(picture.convert("RGB").resize((96, 96)))).float() / 127.5 - 1
    video = torch.stack([face[i : i + 64, i : i + 64] for i in range(8, 13)]).permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        exact, float8 = apply_fast_vae(vae, EXACT), apply_fast_vae(vae, FLOAT8)
        latent = exact.encode(video)
        error = (float8.decode(latent).clamp(-1, 1) - exact.decode(latent).clamp(-1, 1)).square().mean()
        assert 10 * math.log10(4 / float(error)) > 42
        assert relative_l2(float8.encode(video), latent) < 0.03


def test_it_is_taken_by_name_only(monkeypatch):
    assert choose_vae("auto", CPU) == "fast"
    assert choose_vae("fp8", CPU) == "fp8"
    assert not VAES.get("fp8").exact
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Ada card")
    with pytest.raises(ResourceError, match=r"vae: fp8 cannot be used here \(Ada card is no Hopper GPU"):
        choose_vae("fp8", torch.device("cuda", 0))


def test_other_decoders_refuse_it():
    values = ["vae=fp8", "decoder=taehv", "decoder_path=taew2_1.pth"]
    with pytest.raises(
        ConfigError, match="fp8 runs with decoder: full, not taehv; set vae to fast"
    ) as caught:
        load_config("configs/nano.yaml", values)
    assert "\n" not in str(caught.value)
