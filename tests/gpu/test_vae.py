"""The fast VAE on CUDA: its Triton kernel against the eager twin, whole passes against the plain VAE."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from omniavatar.accel.kernels import float8_conv
from omniavatar.accel.kernels.float8_conv import NormTo, input_gain, joins_norm, quantise_conv
from omniavatar.accel.kernels.rows import FP8
from omniavatar.accel.vae import FastVAEConfig, apply_fast_vae
from omniavatar.accel.vae_frames import fused_attention, matmul_attention
from omniavatar.checkpoint.vae import random_vae
from omniavatar.engine.window_loop import to_uint8
from omniavatar.model.sizes import VAEConfig

pytestmark = pytest.mark.gpu


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.cpu().float() - b.cpu().float()).norm() / b.cpu().float().norm()).item()


@pytest.fixture(autouse=True)
def exact_float32():
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


@pytest.fixture(scope="module")
def compare_twins():
    path = Path(__file__).resolve().parents[1] / "unit" / "accel" / "test_vae_fast.py"
    spec = importlib.util.spec_from_file_location("vae_twins", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compare_twins


@pytest.mark.parametrize(
    ("dtype", "tolerance", "every"), [(torch.float32, 1e-5, 7), (torch.bfloat16, 8e-3, 11)]
)
def test_kernel_equals_its_twin(compare_twins, dtype, tolerance, every):
    compare_twins("cuda", dtype, (8, 96, 192, 384), tolerance, every)


def test_attention_twins():
    q, k, v = torch.randn(2, 1000, 3 * 384, device="cuda").chunk(3, dim=-1)
    exact = fused_attention(q, k, v)
    assert relative_l2(matmul_attention(q, k, v), exact) < 1e-4
    assert relative_l2(matmul_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()), exact) < 2e-2


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_float32_equals_the_plain_vae(kernels):
    vae = random_vae(VAEConfig(dim=16), dtype=torch.float32, device="cuda", seed=0)
    video = torch.rand(2, 3, 17, 64, 48, device="cuda") * 2 - 1
    latent = torch.randn(2, 16, 6, 8, 6, device="cuda")
    with torch.inference_mode():
        encoded, decoded = vae.encode(video), vae.decode(latent)
        for at_once in (1, 2, 3):
            config = FastVAEConfig(kernels, latents_at_once=at_once, frames_at_once=4 * at_once)
            fast = apply_fast_vae(vae, config)
            assert relative_l2(fast.encode(video), encoded) < 1e-4
            assert relative_l2(fast.decode(latent), decoded) < 1e-4


def test_bfloat16_is_as_exact_as_the_plain_vae():
    half = random_vae(VAEConfig(), dtype=torch.bfloat16, device="cuda", seed=0)
    exact = random_vae(VAEConfig(), dtype=torch.float32, device="cuda", seed=0)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    latent = torch.randn(1, 16, 4, 20, 24, device="cuda")
    with torch.inference_mode():
        video = exact.decode(latent).clamp(-1, 1)
        decoded, encoded = exact.decode(latent), exact.encode(video)
        plain = relative_l2(half.decode(latent), decoded), relative_l2(half.encode(video), encoded)
        fast_vae = apply_fast_vae(half, FastVAEConfig())
        fast = relative_l2(fast_vae.decode(latent), decoded), relative_l2(fast_vae.encode(video), encoded)
    assert max(plain) < 3e-2
    assert fast[0] <= 1.1 * plain[0] and fast[1] <= 1.1 * plain[1]


def test_queued_copies_arrive_once_synchronised():
    pixels = [torch.rand(1, 3, 4, 40, 72, device="cuda") for _ in range(8)]
    frames = [to_uint8(piece) for piece in pixels]
    torch.cuda.synchronize()
    for piece, copied in zip(pixels, frames, strict=True):
        assert (copied == to_uint8(piece.cpu())).all()


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def float8_case(size: tuple[int, int, int], inputs: int, outputs: int, border: bool):
    """A convolution, its window as the VAE lays it out, and a residual."""
    frames, height, width = size
    gamma = torch.rand(inputs, device="cuda") + 0.5
    gain, padded = input_gain(gamma), inputs % 64 != 0
    weight = torch.randn(outputs, inputs, 3, 3, 3, device="cuda") / (27 * inputs) ** 0.5
    conv = quantise_conv(weight, torch.randn(outputs, device="cuda"), gain, padded)
    shape = (2 + frames, height + 2 * border, width + 2 * padded, inputs)
    normed = F.normalize(torch.randn(shape, device="cuda"), dim=-1) * inputs**0.5 * gamma
    window = (F.silu(normed) * gain).to(FP8)
    if padded:
        window.view(torch.uint8)[:, :, :: width + 1] = 0
    return conv, window, torch.randn(*size, outputs, device="cuda").bfloat16()


@HOPPER
@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize(
    ("size", "inputs", "outputs"),
    [
        ((5, 21, 45), 96, 96),
        ((1, 9, 17), 96, 96),
        ((3, 13, 30), 192, 192),
        ((4, 10, 16), 192, 384),
        ((2, 25, 45), 384, 384),
        ((3, 8, 16), 16, 32),
        ((3, 8, 16), 48, 48),
    ],
)
def test_float8_convolution_equals_its_twin(size, inputs, outputs, border):
    """With and without a residual, a total and a norm; nothing beyond the picture is written."""
    from omniavatar.accel.kernels import float8_conv_cuda

    conv, window, residual = float8_case(size, inputs, outputs, border)
    gamma = torch.rand(outputs, device="cuda") + 0.5
    for kept, added, normed in itertools.product((False, True), repeat=3):
        normed = normed and joins_norm(outputs)
        if not (kept or normed):
            continue
        found = []
        for twin in (float8_conv.convolve, float8_conv_cuda.convolve):
            total = torch.full_like(residual, 7.0)
            wide = torch.full((size[0] + 2, size[1] + 2, size[2] + 2, outputs), 9.0, device="cuda").to(FP8)
            twin(
                window,
                conv,
                residual if added else None,
                border=border,
                total=total if kept else None,
                norm=NormTo(gamma, wide[2:, 1:-1, 1:-1], input_gain(gamma)) if normed else None,
            )
            found.append((total, wide))
        (total, wide), (kernel_total, kernel_wide) = found
        assert relative_l2(kernel_total, total) < 5e-3
        assert relative_l2(kernel_wide, wide) < 1.5e-2
        edge = torch.ones(wide.shape[:3], dtype=torch.bool, device="cuda")
        edge[2:, 1:-1, 1:-1] = False
        assert (kernel_wide.float()[edge] == 9).all()


@HOPPER
def test_float8_vae_equals_its_twin_and_is_near_the_exact_one():
    half = random_vae(VAEConfig(), dtype=torch.bfloat16, device="cuda", seed=0)
    latent = torch.randn(1, 16, 4, 10, 18, device="cuda")
    with torch.inference_mode():
        exact = apply_fast_vae(half, FastVAEConfig()).decode(latent)
        kernel = apply_fast_vae(half, FastVAEConfig(float8=True)).decode(latent)
        eager = apply_fast_vae(half, FastVAEConfig("eager", float8=True)).decode(latent)
        again = apply_fast_vae(half, FastVAEConfig(float8=True)).decode(latent)
    assert torch.equal(kernel, again)
    assert relative_l2(kernel, exact) < 0.08
    # A sum that differs in its last bit can move a float8 value by a whole step, and 30 layers add this up:
    # the errors of both are of one size and mostly the same, not equal.
    error, twin = (kernel - exact).flatten().double(), (eager - exact).flatten().double()
    assert float(error.norm() / twin.norm()) == pytest.approx(1, abs=0.1)
    assert float(F.cosine_similarity(error, twin, dim=0)) > 0.5
