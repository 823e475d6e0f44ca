"""The memory plan: what fits stays, estimates agree with measured peaks, each step down is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.memory_plan import (
    GIB,
    DiTSizes,
    RunSizes,
    denoise_bytes,
    dit_sizes,
    plan_memory,
    resident_blocks,
    smaller,
)
from omniavatar.accel.offload import OffloadConfig, apply_offload
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.errors import ResourceError
from omniavatar.ops.attention import create_attention
from omniavatar.ops.fused import EagerOps

RUN = RunSizes(
    vae=GIB // 4,
    audio_encoder=GIB // 3,
    text_encoder=11 * GIB,
    denoise=7 * GIB,
    decode=GIB,
    decode_latent=GIB,
)
BLOCKS = DiTSizes(blocks=40, block=GIB * 6 // 10, text_layers=GIB // 10, outside=GIB // 2)


@given(st.integers(0, 80 * GIB), st.integers(1, 60), st.integers(1, GIB), st.integers(0, 8 * GIB))
def test_a_plan_fits_and_no_more_blocks_would(limit, blocks, block, denoise):
    dit = DiTSizes(blocks, block, block // 6, GIB // 2)
    run = RunSizes(GIB // 4, GIB // 3, 11 * GIB, denoise, GIB, GIB // 2)
    try:
        plan = plan_memory(dit, run, limit)
    except ResourceError as error:
        assert "max_tokens" in str(error)
        return
    assert plan.peak <= limit and 0 <= plan.resident_blocks <= blocks and plan.ring in (1, 2)
    if plan.streams:
        spare = limit - plan.peak
        assert spare < 2 * (dit.block + dit.text_layers) or plan.resident_blocks == blocks - 1
    steps = [plan]
    while (next_plan := smaller(steps[-1], dit, run)) is not None:
        assert next_plan.peak <= steps[-1].peak and next_plan != steps[-1]
        steps.append(next_plan)
    assert len(steps) <= 12 and (steps[-1].resident_blocks, steps[-1].ring) == (0, 1)


def test_text_encoder_goes_where_it_fits():
    assert plan_memory(BLOCKS, RUN, None).text_encoder == "device"
    assert plan_memory(BLOCKS, RUN, 80 * GIB).text_encoder == "device"
    assert plan_memory(BLOCKS, RUN, 24 * GIB).text_encoder == "device before the DiT"
    assert plan_memory(BLOCKS, RUN, 11 * GIB).text_encoder == "host"


def test_without_a_limit_everything_stays():
    plan = plan_memory(BLOCKS, RUN, None)
    assert not plan.streams and plan.latents_at_once == 2


@pytest.mark.parametrize(
    "variant", [AccelConfig(), AccelConfig(fuse=True), AccelConfig("fp8", True)], ids=str
)
def test_estimated_weights_are_the_models(variant):
    config, cpu = scale_spec("nano").dit, torch.device("cpu")
    _, attention = create_attention("sdpa", cpu, torch.bfloat16)
    dit = random_dit(config, attention=attention, dtype=torch.bfloat16, device=cpu, seed=0)
    apply_accelerations(dit, variant, EagerOps())
    sizes = dit_sizes(config, 2, variant.quantize == "fp8")
    whole = sum(tensor.numel() * tensor.itemsize for tensor in dit.state_dict().values())
    assert sizes.outside + sizes.blocks * (sizes.block + sizes.text_layers) == whole
    buffer = apply_offload(dit, OffloadConfig(0), cpu).ring.slots[0].buffer
    assert sizes.block - 4096 <= buffer.numel() <= sizes.block + 32 * 256


@pytest.mark.parametrize(
    ("scale", "tokens", "peak"),
    [("14B", 30375, 33.17), ("14B", 15750, 30.43), ("1.3B", 30375, 5.12), ("1.3B", 15750, 4.01)],
)
def test_estimate_against_peaks_measured_on_an_h100(scale, tokens, peak):
    """Fused bf16, one prompt (benchmarks/results/2026-11-22_h100_forward.json)."""
    config = scale_spec(scale).dit
    sizes = dit_sizes(config, 2, False)
    weights = sizes.outside + sizes.blocks * (sizes.block + sizes.text_layers)
    estimate = (weights + denoise_bytes(config, tokens, 2, 1, False)) / GIB
    assert peak <= estimate <= peak * 1.1


def test_parameters_of_the_original():
    config = scale_spec("14B").dit
    assert resident_blocks(config, 0) == 0 and resident_blocks(config, 10**12) == 40
    assert resident_blocks(config, 7 * 10**9) in range(18, 21)
