"""The fast VAE against the plain one, and its kernel's eager twin against the plain layers."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from omniavatar.accel.kernels.channel_norm import add_norm, merge_phases, pair_weight, phase_weight
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.accel.vae_frames import fused_attention, matmul_attention
from omniavatar.accel.vae_runners import choose_vae
from omniavatar.checkpoint.vae import random_vae
from omniavatar.errors import ResourceError
from omniavatar.model.sizes import VAEConfig
from omniavatar.model.vae_layers import ChannelRMSNorm

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def plain():
    """Random weights, and what the plain VAE makes of a clip of 17 frames and of five latents."""
    vae = random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=0)
    video, latent = random(1, 3, 17, 32, 48).clamp(-1, 1), random(1, 16, 6, 4, 6)
    with torch.inference_mode():
        return vae, video, latent, vae.encode(video), vae.decode(latent)


@pytest.mark.parametrize("activate", [False, True])
def test_add_norm_equals_the_plain_layers(activate):
    value, residual, bias = random(2, 3, 4, 8), random(2, 3, 4, 8, seed=1), random(8, seed=2)
    norm = ChannelRMSNorm(8, 3)
    norm.gamma.data = random(8, 1, 1, 1, seed=3)
    window = torch.full((4, 3, 4, 8), 7.0)
    total = torch.empty_like(value)
    with torch.inference_mode():
        added = value + bias + residual
        expected = norm(added.permute(3, 0, 1, 2)[None])
        expected = F.silu(expected) if activate else expected
        add_norm(
            value,
            bias,
            residual,
            total=total,
            gamma=norm.gamma,
            out=window[2:],
            activate=activate,
            phases=False,
        )
    assert largest_difference(total, added) <= 1e-6
    assert largest_difference(window[2:], expected[0].permute(1, 2, 3, 0)) <= 1e-5
    assert (window[:2] == 7.0).all()


def test_pairs_of_columns_are_the_same_convolution():
    weight, frames = random(5, 3, 3, 3, 3), random(4, 6, 8, 3, seed=1)
    expected = F.conv3d(frames.permute(3, 0, 1, 2)[None], weight, padding=(0, 1, 1))[0].permute(1, 2, 3, 0)
    pairs = F.pad(frames, (0, 0, 1, 1)).view(4, 6, 5, 6)
    out = F.conv3d(pairs.permute(3, 0, 1, 2)[None], pair_weight(weight), padding=(0, 1, 0))
    got = out[0].permute(1, 2, 3, 0).unflatten(3, (2, 5)).flatten(2, 3)
    assert largest_difference(got, expected) <= 1e-5


def test_sum_may_overwrite_its_parts():
    value, residual = random(1, 3, 4, 8), random(1, 3, 4, 8, seed=1)
    expected = value + residual
    for place in (residual, value):
        copies = {id(value): value.clone(), id(residual): residual.clone()}
        add_norm(
            copies[id(value)],
            None,
            copies[id(residual)],
            total=copies[id(place)],
            gamma=None,
            out=None,
            activate=False,
            phases=False,
        )
        assert torch.equal(copies[id(place)], expected)


def test_four_phases_are_doubling_and_convolution():
    images, weight = random(2, 5, 3, 4), random(6, 5, 3, 3, seed=1)
    expected = F.conv2d(F.interpolate(images, scale_factor=2.0, mode="nearest-exact"), weight, padding=1)
    value = F.conv2d(images, phase_weight(weight), padding=1).permute(0, 2, 3, 1).contiguous()
    assert largest_difference(merge_phases(value), expected.permute(0, 2, 3, 1)) <= 1e-5


def test_attention_twins():
    q, k, v = random(2, 12, 24).chunk(3, dim=-1)
    assert largest_difference(matmul_attention(q, k, v), fused_attention(q, k, v)) <= 1e-5


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"merged_upsample": False, "matmul_attention": False, "paired_columns": False}]
)
def test_equals_the_plain_vae(plain, at_once, options):
    vae, video, latent, encoded, decoded = plain
    config = FastVAEConfig("eager", latents_at_once=at_once, frames_at_once=4 * at_once, **options)
    fast = apply_fast_vae(vae, config)
    with torch.inference_mode():
        assert largest_difference(fast.encode(video), encoded) <= 1e-5
        pieces = list(fast.decode_stream(latent))
        assert largest_difference(torch.cat(pieces, dim=2), decoded) <= 1e-5
        assert largest_difference(fast.encode(video[:, :, :1]), encoded[:, :, :1]) <= 1e-5
    counts = [piece.shape[2] for piece in pieces]
    assert counts[:2] == [1, 4 * at_once] and sum(counts) == 21


def test_batches_are_clips_of_their_own(plain):
    vae, video, latent, _, _ = plain
    fast = apply_fast_vae(vae, FastVAEConfig("eager"))
    videos = torch.cat([video[:, :, :5], video[:, :, 4:9]])
    latents = torch.cat([latent[:, :, :3], latent[:, :, 3:]])
    with torch.inference_mode():
        assert largest_difference(fast.encode(videos), vae.encode(videos)) <= 1e-5
        assert largest_difference(fast.decode(latents), vae.decode(latents)) <= 1e-5


def test_weights_keep_names_values_and_the_plain_vae_works(plain):
    vae, video, _, encoded, _ = plain
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    apply_fast_vae(vae, FastVAEConfig("eager"))
    after = vae.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    with torch.inference_mode():
        assert largest_difference(vae.encode(video), encoded) <= 1e-5


def test_bfloat16_stays_within_its_rounding():
    """Error against float32 is no larger than the plain VAE's own."""
    latent = random(1, 16, 2, 3, 2)
    exact = random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=3)
    half = random_vae(VAEConfig(dim=8), dtype=torch.float32, device="cpu", seed=3).to(torch.bfloat16)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    with torch.inference_mode():
        reference = exact.decode(latent)
        errors = [
            ((vae.decode(latent) - reference).norm() / reference.norm()).item()
            for vae in (half, apply_fast_vae(half, FastVAEConfig("eager")))
        ]
    assert errors[1] <= errors[0] <= 3e-2


def test_convolution_search_is_put_back(plain):
    vae, _, latent, _, _ = plain
    before = torch.backends.cudnn.benchmark
    stream = apply_fast_vae(vae, FastVAEConfig("eager")).decode_stream(latent)
    next(stream)
    assert torch.backends.cudnn.benchmark == before


def test_a_clip_must_have_the_right_length(plain):
    vae, video, *_ = plain
    with pytest.raises(ValueError, match="1\\+4n"):
        apply_fast_vae(vae, FastVAEConfig("eager")).encode(video[:, :, :4])


def test_names():
    assert choose_vae("auto", CPU) == "fast"
    assert choose_vae("plain", CPU) == "plain"
    with pytest.raises(ResourceError, match="auto, plain, fast"):
        choose_vae("tiny", CPU)


@pytest.mark.slow
def test_triton_kernel_in_its_interpreter():
    """The kernel itself, on the CPU, in a process of its own (the interpreter is chosen at import)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def compare_twins(
    device: str, dtype: torch.dtype, widths: tuple[int, ...], tolerance: float, every: int = 1
) -> None:
    """Both `add_norm`s on every combination of arguments, or each `every`-th: CUDA compiles each anew."""
    from omniavatar.accel.kernels import channel_norm_triton

    flags = itertools.product(widths, *[(False, True)] * 6, ((0, 0), (0, 1), (1, 0), (1, 1)))
    for channels, biased, added, kept, normed, activate, phases, (rows, columns) in itertools.islice(
        flags, 0, None, every
    ):
        if not (kept or normed):
            continue
        shape, source = (2, 4, 6, channels), (2, 3, 4, 4 * channels)
        value = random(*(source if phases else shape)).to(device, dtype)
        bias = random(channels, seed=1).to(device, dtype) if biased else None
        residual = random(*shape, seed=2).to(device, dtype) if added else None
        gamma = random(channels, 1, 1, 1, seed=3).to(device, dtype) if normed else None
        results = []
        for twin in (add_norm, channel_norm_triton.add_norm):
            total = torch.zeros(shape, device=device, dtype=dtype)
            window = torch.zeros(4, 4 + 2 * rows, 6 + 2 * columns, channels, device=device, dtype=dtype)
            out = window[2:, rows : 4 + rows, columns : 6 + columns]
            twin(
                value,
                bias,
                residual,
                total=total if kept else None,
                gamma=gamma,
                out=out if normed else None,
                activate=activate,
                phases=phases,
                gain=0.5 if activate else 1.0,
            )
            results.append(torch.cat([total.flatten(), window.flatten()]).float())
        difference = largest_difference(results[1], results[0])
        assert difference <= tolerance, (
            channels,
            biased,
            added,
            kept,
            normed,
            activate,
            phases,
            rows,
            columns,
            difference,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))
    compare_twins("cpu", torch.float32, (8, 96), 1e-5)
