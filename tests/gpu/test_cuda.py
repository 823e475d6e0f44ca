"""CUDA against the CPU twin: one forward, each attention backend, the whole loop. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch

from fused_cases import compare, compare_rescale
from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.accel.attention.timing import attention_seconds, pick
from omniavatar.accel.kernels.fused import create_fused
from omniavatar.accel.kernels.rows import quantize_rows
from omniavatar.accel.kernels.scaled import scaled_linear_eager
from omniavatar.accel.quantized import QuantLinear
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.checkpoint.vae import random_vae
from omniavatar.engine.recorder import NullRecorder
from omniavatar.engine.window_loop import WindowGenerator, WindowSampling
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.sampling.passes import plan_passes
from omniavatar.sampling.schedule import make_schedule
from omniavatar.sampling.step_cache import compute_all
from omniavatar.sampling.windows import plan_windows
from omniavatar.types import Conditioning

pytestmark = pytest.mark.gpu


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.cpu().float() - b.cpu().float()).norm() / b.cpu().float().norm()).item()


def nano(device: str, dtype: torch.dtype, backend: str = "math"):
    """Weights that are equal on every device, made on the CPU in float32."""
    _, attention = create_attention(backend, torch.device(device), dtype)
    spec = scale_spec("nano")
    dit = random_dit(spec.dit, attention=attention, dtype=torch.float32, device="cpu", seed=0)
    vae = random_vae(spec.vae, dtype=torch.float32, device="cpu", seed=0)
    return dit.to(device, dtype), vae.to(device)


def forward(dit, device, dtype):
    generator = torch.Generator().manual_seed(1)
    config = dit.config
    sample = torch.randn(1, 16, 3, 12, 20, generator=generator)
    y = torch.randn(1, 17, 3, 12, 20, generator=generator)
    text = torch.randn(1, 512, config.text_dim, generator=generator)
    audio = torch.randn(1, 9, config.audio_dim, generator=generator)
    with torch.inference_mode():
        return dit(
            sample.to(device),
            y.to(device),
            torch.tensor([700.0], device=device),
            dit.prepare_text(text.to(device)),
            dit.prepare_audio(audio.to(device)),
        )


@pytest.fixture(autouse=True)
def exact_float32():
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def test_forward_float32():
    cpu = forward(nano("cpu", torch.float32)[0], "cpu", torch.float32)
    gpu = forward(nano("cuda", torch.float32)[0], "cuda", torch.float32)
    assert relative_l2(gpu, cpu) < 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "math", "flash", "efficient", "cudnn"])
def test_attention_backends(backend):
    assert backend in ATTENTION.available(torch.device("cuda"))
    exact = forward(nano("cpu", torch.float32)[0], "cpu", torch.float32)
    half = forward(nano("cuda", torch.bfloat16, backend)[0], "cuda", torch.bfloat16)
    assert relative_l2(half, exact) < 2e-2


def test_loop_does_not_depend_on_the_device():
    """Same noise, same windows, same video on CPU and GPU, within float32 rounding."""
    videos = {}
    for device in ("cpu", "cuda"):
        dit, vae = nano(device, torch.float32)
        generator = torch.Generator().manual_seed(2)
        text = torch.randn(2, 512, dit.config.text_dim, generator=generator)
        image = torch.rand(1, 3, 1, 96, 160, generator=generator) * 2 - 1
        audio = torch.randn(30, dit.config.audio_dim, generator=generator).numpy()
        with torch.inference_mode():
            reference = vae.encode(image.to(device))
        conditioning = Conditioning(text[:1].to(device), text[1:].to(device), reference, audio)
        schedule = make_schedule(3, 5.0)
        passes = plan_passes(compute_all(3), guidance_branches(2.0, 3.0, True), has_audio=True)
        sampling = WindowSampling(7, schedule, passes)
        loop = WindowGenerator(
            dit, vae, conditioning, sampling, NullRecorder(), convert=lambda p: p[0].cpu().numpy()
        )
        windows = plan_windows(22, 17, 5)
        videos[device] = torch.cat([torch.from_numpy(f) for r in loop.run(windows) for f in r.frames], dim=1)
    assert videos["cpu"].shape[1] == 23
    assert (videos["cpu"] - videos["cuda"]).abs().max() < 5e-3


@pytest.mark.parametrize(("width", "heads"), [(256, 2), (1536, 12), (5120, 40), (13824, 108)])
def test_fused_kernels(width, heads):
    fast = create_fused(torch.device("cuda"))
    compare(fast, "cuda", torch.float32, width, heads, 1e-5, 5e-3)
    compare(fast, "cuda", torch.bfloat16, width, heads, 5e-3, 1e-2)


def test_float8_product():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 256, generator=generator).cuda().bfloat16()
    linear = torch.nn.Linear(256, 384).cuda().bfloat16()
    layer = QuantLinear.from_linear(linear, create_fused(torch.device("cuda")))
    rows = quantize_rows(x.float())
    slow = scaled_linear_eager(rows, layer.weight, layer.weight_scale, layer.bias, torch.float32)
    assert relative_l2(layer(rows), slow) < 1e-2
    assert relative_l2(layer(x), linear(x)) < 6e-2


@pytest.mark.parametrize("tokens", [3, 40])
def test_int8_product(tokens):
    device = torch.device("cuda", 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 256, generator=generator).to(device).bfloat16()
    linear = torch.nn.Linear(256, 384).to(device).bfloat16()
    ops = create_fused(device, torch.int8)
    layer = QuantLinear.from_linear(linear, ops)
    rows = quantize_rows(x.float(), torch.int8)
    slow = scaled_linear_eager(rows, layer.weight, layer.weight_scale, layer.bias, torch.float32)
    assert relative_l2(layer(rows), slow) < 1e-2
    assert relative_l2(layer(x), linear(x)) < 3e-2
    compare(ops, "cuda", torch.bfloat16, 1536, 12, 5e-3, 1e-2)
    compare_rescale("cuda", torch.bfloat16, 5e-3)


@pytest.mark.parametrize("backend", ["fa3", "fa3_fp8"])
def test_flash_attention_3(backend):
    if backend not in ATTENTION.available(torch.device("cuda")):
        pytest.skip("fa3-fwd is not installed")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1300, 4, 128, generator=generator).cuda().bfloat16() for _ in range(3))
    exact = create_attention("math", torch.device("cuda"), torch.float32)[1](q.float(), k.float(), v.float())
    fast = create_attention(backend, torch.device("cuda"), torch.bfloat16)[1](q, k, v)
    assert relative_l2(fast, exact) < (1e-2 if backend == "fa3" else 8e-2)


@pytest.mark.parametrize(
    ("config", "limit"),
    [(AccelConfig(fuse=True), 1e-2), (AccelConfig("fp8"), 6e-2), (AccelConfig("fp8", True), 6e-2)],
)
def test_accelerated_forward(config, limit):
    exact = forward(nano("cpu", torch.float32)[0], "cpu", torch.float32)
    dit, _ = nano("cuda", torch.bfloat16, "cudnn")
    apply_accelerations(dit, config, create_fused(torch.device("cuda")))
    assert relative_l2(forward(dit, "cuda", torch.bfloat16), exact) < limit


@pytest.mark.parametrize(("backend", "limit"), [("flex", 1e-2), ("sage", 8e-2)])
def test_other_attention(backend, limit):
    device = torch.device("cuda", 0)
    if backend not in ATTENTION.available(device):
        pytest.skip(f"{backend} is not installed")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1300, 4, 128, generator=generator).to(device).bfloat16() for _ in range(3))
    exact = create_attention("math", device, torch.float32)[1](q.float(), k.float(), v.float())
    fast = create_attention(backend, device, torch.bfloat16)[1](q, k.clone(), v)
    assert relative_l2(fast, exact) < limit
    text = k[:, :512]
    before = text.clone()
    create_attention(backend, device, torch.bfloat16)[1](q, text, v[:, :512])
    assert torch.equal(text, before)


def test_measured_attention_is_exact_and_there():
    device = torch.device("cuda", 0)
    seconds = attention_seconds(device, torch.bfloat16, 12, 128)
    assert {"cudnn", "flash"} <= set(seconds) <= set(ATTENTION.available(device))
    assert seconds[pick(seconds)] <= min(seconds.values()) * 1.03
