"""Smaller decoders: TAEHV against a restatement of the published computation, streaming, files, pipeline."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from command_line import REPOSITORY
from engine import make_pipeline, overrides, request
from omniavatar.accel.decoder import OtherDecoder, apply_decoder
from omniavatar.accel.vae import FastVAE
from omniavatar.checkpoint.layout_vae import vae_tensors
from omniavatar.checkpoint.tiny_decoder import (
    light_vae_config,
    load_tiny_decoder,
    random_tiny_decoder,
    tiny_decoder_config,
    tiny_decoder_tensors,
)
from omniavatar.checkpoint.vae import random_vae
from omniavatar.cli import app
from omniavatar.config.load import load_config
from omniavatar.errors import CheckpointError, ConfigError
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.tiny_decoder import TinyDecoder, TinyDecoderConfig, doubled
from omniavatar.model.vae import LATENT_MEAN, LATENT_STD
from omniavatar.plan.preview import missing_files

SMALL = TinyDecoderConfig(widths=(24, 16, 12, 8))
PLACE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


def weights_of(config: TinyDecoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the file's names; the output lies in the middle of its range, clamped little."""
    weights = {}
    for number, (key, shape) in enumerate(tiny_decoder_tensors(config)):
        scale = 0.1 if len(shape) == 1 else 1.4 / math.sqrt(math.prod(shape[1:]))
        weights[key] = random(*shape, seed=seed + number) * scale
        if ".conv.4." in key:
            weights[key] *= 0.3
    weights["decoder.22.weight"] *= 0.04
    weights["decoder.22.bias"] = torch.full((3,), 0.5)
    return weights


def published(weights: dict[str, Tensor], latents_TCHW: Tensor) -> Tensor:
    """Frames (4T-3, 3, H, W) in [0, 1] of one clip as TAEHV computes them: whole clip, layer after layer."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    def block(x: Tensor, name: str) -> Tensor:
        past = torch.zeros_like(x)
        for frame in range(1, len(x)):
            past[frame] = x[frame - 1]
        inner = conv(torch.cat([x, past], 1), f"{name}.conv.0").relu()
        inner = conv(inner, f"{name}.conv.2").relu()
        return (conv(inner, f"{name}.conv.4") + x).relu()

    x = conv(torch.tanh(latents_TCHW / 3) * 3, "decoder.1").relu()
    for start, stride in ((3, 1), (9, 2), (15, 2)):
        for number in range(start, start + 3):
            x = block(x, f"decoder.{number}")
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = conv(x, f"decoder.{start + 4}.conv", padding=0)
        x = x.reshape(len(x) * stride, -1, *x.shape[2:])
        x = conv(x, f"decoder.{start + 5}")
    return conv(x.relu(), "decoder.22").clamp(0, 1)[3:]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return weights_of(SMALL)


def decoder_of(weights: dict[str, Tensor], **changes: Any) -> TinyDecoder:
    decoder = TinyDecoder(replace(SMALL, **changes)).requires_grad_(False)
    decoder.load_state_dict(weights)
    return decoder


def decoded(decoder: Any, latent: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat(list(decoder.decode_stream(latent)), dim=2)


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_equals_the_published_computation_in_pieces_of_any_length(weights, at_once) -> None:
    latent = random(2, 16, 5, 4, 6, seed=9) * 1.5
    expected = torch.stack([published(weights, clip.transpose(0, 1)).transpose(0, 1) for clip in latent])
    assert expected.shape == (2, 3, 17, 32, 48)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.9, "or the comparison is one of clamps"
    pixels = decoded(decoder_of(weights, latents_at_once=at_once), latent)
    assert largest_difference(pixels, expected * 2 - 1) <= 1e-5
    counts = [piece.shape[2] for piece in decoder_of(weights, latents_at_once=1).decode_stream(latent)]
    assert counts == [1, 4, 4, 4, 4]


def test_channels_last_and_half_precision_change_only_rounding(weights) -> None:
    latent = random(1, 16, 4, 4, 6)
    exact = decoded(decoder_of(weights), latent)
    vae = random_vae(VAEConfig(dim=8), seed=0, **PLACE)
    fast = apply_decoder(vae, decoder_of(weights))
    assert largest_difference(decoded(fast, latent), exact) <= 1e-5
    half = decoder_of(weights).to(torch.bfloat16)
    error = (decoded(half, latent) - exact).norm() / exact.norm()
    assert 0 < error < 3e-2


def test_the_first_frames_do_not_know_the_later_ones(weights) -> None:
    """Causal: what was written of a window does not change with what comes after."""
    latent = random(1, 16, 4, 4, 6)
    changed = latent.clone()
    changed[:, :, 3] += 1.0
    first, second = decoded(decoder_of(weights), latent), decoded(decoder_of(weights), changed)
    assert torch.equal(first[:, :, :9], second[:, :, :9])
    assert not torch.equal(first[:, :, 9:], second[:, :, 9:])


def test_raw_latents_are_the_full_vaes_own(weights) -> None:
    latent = random(1, 16, 3, 4, 6) * 0.5
    shape = (1, 16, 1, 1, 1)
    own = latent * torch.tensor(LATENT_STD).view(shape) + torch.tensor(LATENT_MEAN).view(shape)
    raw = decoder_of(weights, raw_latents=True)
    assert largest_difference(decoded(raw, latent), decoded(decoder_of(weights), own)) <= 1e-5
    assert largest_difference(decoded(raw, latent), decoded(decoder_of(weights), latent)) > 0.05


def test_sizes_of_the_released_files() -> None:
    released = dict(tiny_decoder_tensors(TinyDecoderConfig()))
    assert {
        key: tuple(v.shape) for key, v in TinyDecoder(TinyDecoderConfig()).state_dict().items()
    } == released
    assert released["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert released["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert released["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert released["decoder.20.weight"] == (64, 64, 3, 3) and "decoder.20.bias" not in released
    count = sum(math.prod(shape) for shape in released.values())
    assert 9.5e6 < count < 10.5e6
    assert tiny_decoder_config(VAEConfig()) == TinyDecoderConfig()
    light = dict(vae_tensors(light_vae_config(VAEConfig())))
    assert light["decoder.conv1.weight"] == (96, 16, 3, 3, 3)
    assert light["decoder.head.2.weight"] == (3, 24, 3, 3, 3)


def save(path: Path, weights: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_files_load_strictly_and_without_the_encoder_half(weights, tmp_path, name) -> None:
    stored = {key: value.half() for key, value in weights.items()}
    path = save(tmp_path / name, {**stored, "encoder.0.weight": torch.zeros(64, 3, 3, 3)})
    decoder = load_tiny_decoder(path, raw_latents=False, z_dim=16, **PLACE)
    assert decoder.config == SMALL
    latent = random(1, 16, 2, 4, 6)
    assert largest_difference(decoded(decoder, latent), decoded(decoder_of(weights), latent)) < 1e-2
    assert load_tiny_decoder(path, raw_latents=True, z_dim=16, **PLACE).config.raw_latents


def test_unfitting_files_are_named(weights, tmp_path) -> None:
    def load(stored: dict[str, Tensor]) -> None:
        path = save(tmp_path / "file.safetensors", stored)
        load_tiny_decoder(path, raw_latents=False, z_dim=16, **PLACE)

    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.22\.bias"):
        load({key: value for key, value in weights.items() if key != "decoder.22.bias"})
    with pytest.raises(CheckpointError, match=r"1 unexpected: decoder\.23\.bias"):
        load({**weights, "decoder.23.bias": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"1 misshaped: decoder\.7\.conv\.weight is 48x24x1x1"):
        load({**weights, "decoder.7.conv.weight": torch.zeros(48, 24, 1, 1)})
    with pytest.raises(CheckpointError, match=r"48 channels, not 16; use the file for Wan 2\.1"):
        load(weights_of(replace(SMALL, z_dim=48)))
    with pytest.raises(CheckpointError, match=r"not a TAEHV decoder.*decoder=lightvae"):
        load({"decoder.conv1.weight": torch.zeros(8, 16, 3, 3, 3)})


def light_vae_file(path: Path, z_dim: int = 16) -> Path:
    vae = random_vae(VAEConfig(dim=16, z_dim=z_dim), seed=5, **PLACE)
    return save(path, vae.state_dict())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text-cache")


@pytest.mark.parametrize("decoder", ["lightvae", "taehv", "lighttae"])
def test_videos_with_each_decoder(nano_checkpoint, cache, tmp_path, weights, decoder) -> None:
    file = tmp_path / "decoder.pth"
    if decoder == "lightvae":
        light_vae_file(file)
    else:
        save(file, weights)
    pipe = make_pipeline(nano_checkpoint, cache, decoder=decoder, decoder_path=str(file))
    full = make_pipeline(nano_checkpoint, cache)
    frames, other = (
        np.concatenate([chunk.frames for chunk in each.stream(request(0.9))]) for each in (pipe, full)
    )
    assert frames.shape == other.shape and not np.array_equal(frames, other)
    vae, picture = pipe.models.vae, random(1, 3, 1, 64, 64).clamp(-1, 1)
    assert isinstance(vae, OtherDecoder)
    assert torch.equal(vae.encode(picture), full.models.vae.encode(picture)), "the full VAE encodes"
    sidecar = json.loads(pipe.generate(request(0.3), tmp_path / "out.mp4").sidecar.read_text())
    assert sidecar["decoder"] == decoder
    assert json.loads(sidecar["fingerprint"]["model.decoder"]) == decoder
    assert "file.decoder.pth" in sidecar["fingerprint"]


@pytest.mark.parametrize("decoder", ["lightvae", "taehv", "lighttae"])
def test_random_weights_need_no_file(decoder) -> None:
    values = dict(
        weights="random", scale="nano", dtype="fp32", device="cpu", num_steps=1, guidance_scale=1.0,
        image_sizes_720=[[64, 64]], max_tokens=56, overlap_frame=5, decoder=decoder, vae="fast",
    )  # fmt: skip
    from omniavatar import AvatarPipeline

    pipe = AvatarPipeline.from_config(load_config(None, values).config)
    assert sum(len(chunk.frames) for chunk in pipe.stream(request(0.3))) == 16
    inner = pipe.models.vae.decoder
    assert isinstance(inner, FastVAE if decoder == "lightvae" else TinyDecoder)
    assert decoder == "lightvae" or inner.config.raw_latents is (decoder == "lighttae")


def test_a_decoder_for_other_latents_is_refused(nano_checkpoint, cache, tmp_path) -> None:
    file = light_vae_file(tmp_path / "other.safetensors", z_dim=8)
    pipe = make_pipeline(nano_checkpoint, cache, decoder="lightvae", decoder_path=str(file))
    with pytest.raises(CheckpointError, match="8 channels, not 16"):
        _ = pipe.models.vae


def test_names_and_paths_go_together(nano_checkpoint, cache, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"decoder_path.*set decoder to lightvae, taehv or lighttae"):
        make_pipeline(nano_checkpoint, cache, decoder_path="taew2_1.pth")
    with pytest.raises(ConfigError, match="decoder_path not set"):
        make_pipeline(nano_checkpoint, cache, decoder="taehv")
    gone = str(tmp_path / "gone.pth")
    values = overrides(nano_checkpoint, cache, decoder="taehv", decoder_path=gone)
    assert Path(gone) in missing_files(load_config(None, values).config.model)
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        _ = make_pipeline(nano_checkpoint, cache, decoder="taehv", decoder_path=gone).models.vae


def test_plan_names_the_decoder_and_counts_its_weights() -> None:
    def planned(*more: str) -> dict[str, Any]:
        command = ["plan", "--config", str(REPOSITORY / "configs" / "inference_1.3B.yaml"), "--json"]
        result = CliRunner().invoke(app, [*command, *(f"--hp={each}" for each in more)])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    full = planned()
    small = planned("decoder=taehv,decoder_path=taew2_1.pth")
    assert (full["decoder"], small["decoder"]) == ("full", "taehv")
    extra = small["memory"]["vae"] - full["memory"]["vae"]
    assert extra == 2 * sum(math.prod(shape) for _, shape in tiny_decoder_tensors(TinyDecoderConfig()))


def test_random_decoder_is_finite_and_on_its_device() -> None:
    decoder = random_tiny_decoder(tiny_decoder_config(VAEConfig(dim=8)), seed=3, **PLACE)
    pixels = decoded(decoder, random(1, 16, 3, 4, 6))
    assert pixels.shape == (1, 3, 9, 32, 48) and pixels.isfinite().all() and pixels.std() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (16, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_doubling_only_moves_numbers(dtype, channels, stride, memory_format) -> None:
    """As splitting the channels into frames, then nearest upsampling; gradients too."""
    values = torch.randn(3, channels, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    values = values.contiguous(memory_format=memory_format)
    frames = values.unflatten(1, (stride, -1)).flatten(0, 1)
    expected = F.interpolate(frames, scale_factor=2.0, mode="nearest")
    made = doubled(values, stride)
    assert torch.equal(made, expected) and made.is_contiguous(memory_format=torch.channels_last)
    doubled(values.requires_grad_(), stride).sum().backward()
    assert torch.equal(values.grad, torch.full_like(values, 4.0))
