"""Fused blocks and float8 layers against the plain model, with the eager twins (the kernels: tests/gpu)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.fused_blocks import apply_fused_blocks
from omniavatar.accel.kernels.rows import EagerOps, quantize_rows
from omniavatar.accel.precision import QUANTIZED
from omniavatar.accel.quantized import QuantLinear, apply_quantization
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec

TESTS = Path(__file__).resolve().parents[2]


def nano(dtype=torch.float32):
    _, attention = create_attention("sdpa", torch.device("cpu"), dtype)
    return random_dit(scale_spec("nano").dit, attention=attention, dtype=dtype, device="cpu", seed=0)


def forward(dit, batch: int = 2, with_audio: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 16, 3, 8, 12, generator=generator)
    y = torch.randn(batch, 17, 3, 8, 12, generator=generator)
    text = torch.randn(batch, 20, dit.config.text_dim, generator=generator)
    audio = torch.randn(batch, 9, dit.config.audio_dim, generator=generator) if with_audio else None
    with torch.inference_mode():
        states = dit.prepare_text(text), dit.prepare_audio(audio)
        return dit(sample, y, torch.tensor([700.0, 30.0][:batch]), *states)


def relative_l2(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("with_audio", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_equals_plain(dtype, limit, with_audio):
    dit = nano(dtype)
    plain = forward(dit, with_audio=with_audio)
    keys = {key: value.clone() for key, value in dit.state_dict().items()}
    apply_fused_blocks(dit, EagerOps())
    assert relative_l2(forward(dit, with_audio=with_audio), plain) <= limit
    assert dit.state_dict().keys() == keys.keys()
    assert all(torch.equal(dit.state_dict()[key], value) for key, value in keys.items())


@pytest.mark.parametrize("fused", [False, True])
def test_int8_is_close_and_not_equal(fused):
    exact = forward(nano())
    dit, ops = nano(), EagerOps(torch.int8)
    apply_quantization(dit, ops)
    assert dit.blocks[0].ffn[0].weight.dtype == torch.int8
    if fused:
        apply_fused_blocks(dit, ops)
    assert 1e-4 < relative_l2(forward(dit), exact) < 3e-2


def test_int8_rows_reach_the_ends():
    rows = torch.tensor([[-254.0, 3.0, 127.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    quantised = quantize_rows(rows, torch.int8)
    assert quantised.data.tolist() == [[-127, 2, 64, 1], [0, 0, 0, 0]]
    assert quantised.scale[0].item() == 2.0


def test_float8_is_close_and_not_equal():
    exact = forward(nano())
    for fused in (False, True):
        dit = nano()
        apply_quantization(dit, EagerOps())
        if fused:
            apply_fused_blocks(dit, EagerOps())
        assert 1e-4 < relative_l2(forward(dit), exact) < 6e-2
    for name in QUANTIZED:
        assert isinstance(dit.blocks[0].get_submodule(name), QuantLinear)


def test_float8_fused_equals_float8_plain():
    plain, fused = nano(), nano()
    for dit in (plain, fused):
        apply_quantization(dit, EagerOps())
    apply_fused_blocks(fused, EagerOps())
    # rows are rounded to the residual's dtype before quantising in the plain block only: float32, so equal
    assert relative_l2(forward(fused), forward(plain)) < 5e-3


def test_row_quantisation_uses_the_whole_range():
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-4], [1], [1e3], [7], [0]]
    )
    quantised = quantize_rows(rows)
    assert quantised.data.float().abs().amax(-1)[:4].tolist() == [448.0] * 4
    error = (quantised.dequantize() - rows).norm(dim=-1)[:4] / rows.norm(dim=-1)[:4]
    assert error.max() < 0.04
    assert not quantised.dequantize()[4].any()


INTERPRETED = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from fused_cases import compare, compare_rescale
from omniavatar.accel.kernels.fused_triton import TritonOps
for width, heads in ((256, 2), (192, 3), (320, 5)):
    compare(TritonOps(), "cpu", torch.float32, width, heads, 1e-5, 0.12)  # the interpreter cuts float8 off
compare(TritonOps(), "cpu", torch.bfloat16, 256, 2, 6e-3, 0.12)
compare(TritonOps(row_dtype=torch.int8), "cpu", torch.float32, 192, 3, 1e-5, 0.12)
compare_rescale("cpu", torch.float32, 1e-5)
"""


def test_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed (CUDA builds of torch bring it)")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED, str(TESTS)], env=environment, check=True)
