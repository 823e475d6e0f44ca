"""The instruments on a GPU: synchronised steps, both traces, the benchmark of the nano model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine import make_pipeline, overrides, request
from omniavatar.config.load import load_config
from omniavatar.engine.clocks import DeviceClock
from omniavatar.engine.events import StepFinished
from omniavatar.engine.requests_file import RequestLine
from omniavatar.measure.benchmark.row import Options, measure
from omniavatar.measure.ceilings import ceilings, probe
from omniavatar.measure.machine import devices, free_memory
from omniavatar.measure.profile import profile_requests
from omniavatar.measure.trace import TraceRecorder

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).resolve().parents[2]


def test_profiled_run_on_the_gpu(nano_checkpoint: Path, tmp_path: Path) -> None:
    changes = {"device": "cuda", "dtype": "bf16", "seq_len": 30, "output_dir": str(tmp_path / "out")}
    config = load_config(None, overrides(nano_checkpoint, tmp_path, **changes)).config
    line = RequestLine(0, 0, "a person", REPOSITORY / "examples" / "portrait.png", None)
    run = profile_requests(config, [line], kernels=tmp_path / "kernels.json")
    assert run.peak_memory.peak_gpu_bytes > 0
    for window in run.report.windows:
        steps = sum(step.seconds for step in window.steps)
        assert steps == pytest.approx(window.denoise, rel=0.05, abs=2e-3)
    events = json.loads((tmp_path / "kernels.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


def test_a_step_lasts_until_the_gpu_is_done() -> None:
    recorder = TraceRecorder()
    recorder.use_clock(DeviceClock(torch.device("cuda")))
    a = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    with recorder.stage("denoise"):
        for step in range(2):
            for _ in range(10):
                a @ a
            recorder.event(StepFinished(0, step, 2, "compute", 1))
    steps = [span.seconds for span in recorder.spans() if span.name == "step"]
    assert min(steps) > 10 * 2 * 8192**3 / 1e15, "a petaflop a second is beyond any device in float32"


def test_profiling_changes_no_frame(nano_checkpoint: Path, tmp_path: Path) -> None:
    plain = make_pipeline(nano_checkpoint, tmp_path, device="cuda")
    traced = make_pipeline(nano_checkpoint, tmp_path, TraceRecorder(), device="cuda")
    for a, b in zip(plain.stream(request()), traced.stream(request()), strict=True):
        assert (a.frames == b.frames).all()


def test_benchmark_of_the_nano_model_on_the_gpu() -> None:
    changes = ("weights=random,scale=nano,dtype=bf16,device=cuda",)
    row = measure(Options(str(REPOSITORY / "configs" / "nano.yaml"), "", changes, 1, 2, full=True))
    assert row.status == "measured" and row.peak_memory.peak_gpu_bytes > 0
    assert row.full.seconds > 0
    tight = Options(str(REPOSITORY / "configs" / "inference.yaml"), "", ("max_tokens=100000000,device=cuda",))
    assert "GB are needed" in measure(tight).reason


def test_machine_and_ceilings() -> None:
    device = torch.device("cuda")
    assert 0 < free_memory(device) <= devices()[0]["total_bytes"]
    known, found = ceilings(device, torch.bfloat16), probe(device, torch.bfloat16)
    assert found.matrix > 0.5 * known.matrix and found.matrix < 1.2 * known.matrix
