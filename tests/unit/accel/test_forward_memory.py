"""What a fused forward holds at once, counted from the CPU allocator's own record of allocations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omniavatar.accel.apply import AccelConfig, apply_accelerations
from omniavatar.accel.kernels.rows import EagerOps
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec

TOKENS = (4, 16, 16)


class LeanOps(EagerOps):
    """Passes that allocate their results and nothing else, as the kernels do; numbers are left out."""

    def norm(self, x, scale, shift, eps, *, update_BLC=None, gate=None, frame_BTC=None, quantize=False):
        added = update_BLC is not None or frame_BTC is not None
        return (torch.zeros_like(x) if added else x), torch.zeros_like(x)

    def add_gated(self, x, update, gate):
        return torch.zeros_like(x)

    def rms(self, x, weight, eps):
        return torch.zeros_like(x)

    def rms_rotate(self, x, weight, eps, cos, sin, heads, dtype):
        return torch.zeros(x.shape, dtype=dtype).unflatten(-1, (heads, -1))


def peak_bytes(run, folder: Path) -> int:
    """Most bytes alive during `run` beyond those alive before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        run()
    trace.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "[memory]"]
    steps.sort(key=lambda event: event["ts"])
    alive = peak = 0
    for event in steps:
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


@pytest.mark.parametrize(("ffn", "widths"), [(2048, 8), (8192, 3 + 8)])
def test_a_fused_block_holds_eight_widths_or_three_and_the_feed_forward(ffn, widths, tmp_path):
    def attention(q, k, v):
        return torch.zeros(q.shape)

    config = replace(scale_spec("nano").dit, dim=1024, num_heads=8, ffn_dim=ffn, num_layers=4)
    dit = random_dit(config, attention=attention, dtype=torch.float32, device="cpu", seed=0)
    apply_accelerations(dit, AccelConfig(fuse=True), LeanOps())
    frames, height, width = TOKENS
    sample, y = torch.zeros(1, 16, frames, height, width), torch.zeros(1, 17, frames, height, width)
    with torch.inference_mode():
        text = dit.prepare_text(torch.zeros(1, 8, config.text_dim))
        audio = dit.prepare_audio(torch.zeros(1, 4 * frames - 3, config.audio_dim))
        timestep = torch.tensor([500.0])
        peak = peak_bytes(lambda: dit(sample, y, timestep, text, audio), tmp_path)
    one_width = frames * height * width // 4 * config.dim * 4
    assert widths * one_width <= peak < (widths + 1) * one_width
