"""FLOP formulas, ceilings, traces, reports and quality figures of the profiler."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.engine.events import RequestFinished, RequestStarted, StepFinished, WindowStarted
from omniavatar.measure import flops
from omniavatar.measure.ceilings import Ceilings, ceilings, fp8_ceilings
from omniavatar.measure.kernels import KernelTrace
from omniavatar.measure.peaks import PeakMemory
from omniavatar.measure.quality import WINDOW, compare, ssim
from omniavatar.measure.report import ModelSizes, RequestFigures, build_report, decoded_latents
from omniavatar.measure.report_table import print_report, seconds_text
from omniavatar.measure.trace import TraceRecorder, chrome_trace
from omniavatar.model.dit import WanDiT
from omniavatar.model.vae import WanVAE
from omniavatar.sampling.windows import plan_windows
from omniavatar.types import bytes_text
from queue_clock import QueueClock

LATENT = (3, 6, 8)
RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"

# FLOPs, against PyTorch's counter on tensors without memory


def counted(run: object) -> int:
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return int(counter.get_total_flops())


def test_dit_flops_are_those_of_the_counter() -> None:
    config = scale_spec("nano").dit
    frames, height, width = LATENT
    _, attention = create_attention("math", torch.device("cpu"), torch.float32)
    with torch.device("meta"), torch.inference_mode():
        dit = WanDiT(config, attention)
        text = dit.prepare_text(torch.empty(1, 512, config.text_dim))
        audio = dit.prepare_audio(torch.empty(1, 4 * frames - 3, config.audio_dim))
        sample, y = torch.empty(1, 16, *LATENT), torch.empty(1, 17, *LATENT)
        whole = counted(lambda: dit(sample, y, torch.empty(1), text, audio))
        skipped = counted(lambda: dit(sample, y, torch.empty(1), text, audio, run_blocks=lambda x, _: x))
        prepared = counted(lambda: dit.prepare_text(torch.empty(1, 512, config.text_dim)))
        heard = counted(lambda: dit.prepare_audio(torch.empty(1, 4 * frames - 3, config.audio_dim)))
    assert flops.video_tokens(config, LATENT) == frames * height * width // 4
    assert flops.forward_work(config, LATENT).total == whole
    assert flops.skipped_forward_work(config, LATENT).total == skipped
    assert flops.text_work(config).total == prepared
    assert flops.audio_work(config, frames).total == heard


@pytest.mark.parametrize("scale", ["nano", "14B"])
@pytest.mark.parametrize("frames", [1, 3])
def test_vae_flops_are_those_of_the_counter(scale: str, frames: int) -> None:
    config = scale_spec(scale).vae
    with torch.device("meta"), torch.inference_mode():
        vae = WanVAE(config)
        decode = counted(lambda: vae.decode(torch.empty(1, 16, frames, 6, 8)))
        encode = counted(lambda: vae.encode(torch.empty(1, 3, 4 * frames - 3, 48, 64)))
    assert flops.decode_work(config, (frames, 6, 8)).total == decode
    assert flops.encode_work(config, 4 * frames - 3, (48, 64)).total == encode


def test_known_work_of_the_guides_window() -> None:
    work = flops.forward_work(scale_spec("14B").dit, (27, 50, 90))
    assert work.matrix / 1e12 == pytest.approx(726, abs=1)
    assert flops.decode_work(scale_spec("14B").vae, (27, 50, 90)).total / 1e12 == pytest.approx(257, abs=1)


# Ceilings


def test_floor_is_both_kinds_of_work_one_after_the_other() -> None:
    limits = Ceilings("d", "bf16", matrix=100.0, attention=50.0, source="s")
    assert limits.floor_seconds(flops.Work(int(2e14), int(1e14))) == pytest.approx(4.0)


def test_unknown_devices_are_probed_and_say_so() -> None:
    found = ceilings(torch.device("cpu"), torch.float32)
    assert found.matrix > 0 and found.attention > 0 and found.source.startswith("probed just now")
    assert fp8_ceilings(torch.device("cpu")) is None


# Traces


def started(windows: int) -> RequestStarted:
    return RequestStarted(0, "out.mp4", frames=5, windows=windows, steps=2, resumed_windows=0)


def record(recorder: TraceRecorder, windows: int = 2, steps: int = 2) -> None:
    with recorder.stage("text"), recorder.stage("load_text_encoder"):
        pass
    recorder.event(started(windows))
    for window in range(windows):
        recorder.event(WindowStarted(window, windows))
        with recorder.stage("denoise"):
            for step in range(steps):
                time.sleep(0.002)
                recorder.event(StepFinished(window, step, steps, "compute", 1))
        with recorder.stage("vae_decode"):
            pass
        thread = threading.Thread(target=write, args=[recorder])
        thread.start()
        thread.join()
    recorder.event(RequestFinished("out.mp4", 1.0, 5))


def write(recorder: TraceRecorder) -> None:
    with recorder.stage("video_write"):
        pass


def test_steps_follow_one_another_inside_their_denoise_stage() -> None:
    recorder = TraceRecorder()
    record(recorder)
    spans = recorder.spans()
    denoise = [span for span in spans if span.name == "denoise"]
    steps = [span for span in spans if span.name == "step"]
    assert [span.window for span in denoise] == [0, 1]
    assert [(s.window, s.details["step"]) for s in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for span in steps:
        around = denoise[span.window or 0]
        assert around.start <= span.start and span.end <= around.end and span.depth == 1
    assert steps[0].start == denoise[0].start and steps[1].start == steps[0].end
    assert all(span.seconds >= 0.002 for span in steps)


def test_spans_are_the_devices_and_nobody_waits_for_it_before_they_are_read() -> None:
    recorder, clock = TraceRecorder(), QueueClock(step=1, origin=100)
    recorder.use_clock(clock)
    record(recorder)
    assert clock.reads == 0 and clock.marks == 2 * 2 + 2 * (2 * 2 + 2), (
        "two a stage of this thread, one a step"
    )
    spans = recorder.spans()
    steps = [span for span in spans if span.name == "step"]
    assert [(step.start, step.end) for step in steps] == [(105, 106), (106, 107), (111, 112), (112, 113)]
    denoise = [span for span in spans if span.name == "denoise"]
    assert [(span.start, span.end) for span in denoise] == [(105, 108), (111, 114)]
    written = [span for span in spans if span.name == "video_write"]
    assert len(written) == 2 and all(span.seconds < 1 for span in written), "by the host's clock"


def test_a_stage_that_has_not_ended_is_no_span() -> None:
    recorder = TraceRecorder()
    with recorder.stage("denoise"):
        assert recorder.spans() == ()
    assert [span.name for span in recorder.spans()] == ["denoise"]


def test_stage_times_are_those_of_the_ordinary_recorder_and_survive_errors() -> None:
    recorder = TraceRecorder()
    with pytest.raises(ValueError), recorder.stage("denoise"):
        raise ValueError
    (span,) = recorder.spans()
    assert recorder.timings()["denoise"].seconds == pytest.approx(span.seconds, abs=1e-3)


def test_chrome_trace_has_what_perfetto_reads() -> None:
    recorder = TraceRecorder()
    record(recorder)
    trace = json.loads(json.dumps(chrome_trace(recorder.spans())))
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(recorder.spans())
    assert all({"name", "ts", "dur", "pid", "tid"} <= set(event) for event in complete)
    assert min(event["ts"] for event in complete) == 0 and all(event["dur"] >= 0 for event in complete)
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names[0] == "model"
    assert {names[e["tid"]][:6] for e in complete if e["name"] == "video_write"} == {"writer"}
    assert "step 1 (compute)" in {event["name"] for event in complete}
    assert chrome_trace([]) == {"traceEvents": [], "displayTimeUnit": "ms"}


def test_recording_costs_well_under_a_percent_of_a_step() -> None:
    recorder = TraceRecorder()
    begun = time.thread_time()  # of this thread: others may have the core meanwhile
    for step in range(1000):
        with recorder.stage("denoise"):
            recorder.event(StepFinished(0, step, 1000, "compute", 1))
    assert (time.thread_time() - begun) / 1000 < 5e-4, "the nano model's step on a CPU takes 50 ms and more"


def test_kernel_trace_covers_one_window(tmp_path: Path) -> None:
    taker = KernelTrace(tmp_path / "kernels.json", on_gpu=False)
    recorder = TraceRecorder([taker])
    recorder.event(started(3))
    for window in range(3):
        recorder.event(WindowStarted(window, 3))
        torch.ones(4).add(window)
    recorder.event(RequestFinished("out.mp4", 1.0, 5))
    assert taker.window == 1
    events = json.loads((tmp_path / "kernels.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::add" for event in events) == 1
    taker.stop()


# Reports


def figures(frames: int = 20) -> RequestFigures:
    windows = plan_windows(frames - 1, 13, 5)
    forwards = 2 * 2 * len(windows)
    return RequestFigures(
        "v.mp4", frames, 25, 2.0, (64, 64), windows, 64, 3, "CCs", 2, forwards, forwards // 2
    )


def test_sparse_attention_counts_what_it_computed() -> None:
    recorder = TraceRecorder()
    record(recorder)
    spec = scale_spec("nano")
    models, limits = ModelSizes(spec.dit, spec.vae), Ceilings("d", "fp32", 1.0, 1.0, "s")

    def report(kept: float):
        request = replace(figures(), kept_share=kept)
        return build_report(recorder.spans(), recorder.timings(), [request], models, limits, None, 1.0)

    dense, sparse = (
        next(row.tflop for row in report(kept).work if row.name == "denoise") for kept in (1.0, 0.25)
    )
    tokens = 4 * 4 * 4
    assert figures().as_dict().keys() == replace(figures(), kept_share=0.25).as_dict().keys() - {"kept_share"}
    saved = 0.75 * 4 * tokens**2 * spec.dit.dim * spec.dit.num_layers * figures().forwards
    assert (dense - sparse) * 1e12 == pytest.approx(saved)
    console = Console(record=True, width=200)
    print_report(report(0.25), PeakMemory(None, 1), console)
    assert "sparse attention: 25% of the matrix computed" in console.export_text()


def test_report_counts_work_and_shares() -> None:
    recorder = TraceRecorder()
    record(recorder)
    spec = scale_spec("nano")
    limits = Ceilings("d", "fp32", 1.0, 1.0, "s")
    request = figures()
    report = build_report(
        recorder.spans(), recorder.timings(), [request], ModelSizes(spec.dit, spec.vae), limits, None, 1.0
    )
    assert sum(row.share for row in report.stages if row.share is not None) == pytest.approx(1)
    beside = [row.name for row in report.stages if row.beside_the_model]
    assert beside == ["video_write"]
    assert report.overall.real_time_factor == pytest.approx(2.0 / (20 / 25))
    assert report.steps["compute"].count == 4
    assert [len(row.steps) for row in report.windows] == [2, 2]
    work = {row.name: row for row in report.work}
    latent = (4, 8, 8)
    expected = flops.forward_work(spec.dit, latent).total * request.forwards
    expected += flops.skipped_forward_work(spec.dit, latent).total * request.forwards_skipped
    assert work["denoise"].tflop * 1e12 == pytest.approx(expected)
    assert work["denoise"].floor_seconds == pytest.approx(expected / 1e12)
    console = Console(record=True, width=200)
    print_report(report, PeakMemory(None, 2_340_000_000), console)
    text = console.export_text()
    assert "peak memory: 2.34 GB on the host" in text and "real-time factor 2.5" in text
    assert "denoising" in text and "not exact" not in text
    print_report(report, PeakMemory(None, 1), console, vae="fp8")
    assert "VAE: fp8, which is not exact, in both directions" in console.export_text()
    assert [sorted(row) for row in report.as_dict()["windows"]] == [
        ["denoise", "request", "steps", "vae_decode", "window"]
    ] * 2


def test_the_report_is_written_with_the_keys_it_always_had() -> None:
    """Those of a file in benchmarks/results."""
    recorder = TraceRecorder()
    record(recorder)
    spec = scale_spec("nano")
    limits = Ceilings("d", "fp32", 1.0, 1.0, "s")
    made = build_report(
        recorder.spans(), recorder.timings(), [figures()], ModelSizes(spec.dit, spec.vae), limits, limits, 1.0
    ).as_dict()
    before = json.loads((RESULTS / "2026-11-26_h100_profile.json").read_text())
    assert set(made["overall"]) == set(before["overall"])
    for name in ("requests", "stages", "work", "ceilings"):
        assert set(made[name][0]) == set(before[name][0])
    assert set(made["steps"]["compute"]) == set(before["steps"]["compute"])
    assert set(made["windows"][0]) == set(before["windows"][0]) - {"vae_encode"}, "no hand-over recorded"
    assert set(made["windows"][0]["steps"][0]) == set(before["windows"][0]["steps"][0])


def test_last_window_stops_decoding_at_its_last_frame() -> None:
    first, second = plan_windows(19, 13, 5)
    assert decoded_latents(first, last=False) == 4
    assert (second.new_frames, decoded_latents(second, last=True)) == (7, 3)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (600, "10.0 min"), (9000, "2.5 h")]
)
def test_seconds_read_well(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.00 MB"),
        (28_800_000, "28.8 MB"),
        (99_600_000, "99.6 MB"),
        (10**8, "0.10 GB"),
        (9_990_000_000, "9.99 GB"),
        (59_600_000_000, "59.6 GB"),
        (115e9, "115 GB"),
    ],
)
def test_bytes_read_well(count: float, text: str) -> None:
    assert bytes_text(count) == text


# Quality


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    values = []
    for y in range(a.shape[0] - WINDOW + 1):
        for x in range(a.shape[1] - WINDOW + 1):
            p, q = (m[y : y + WINDOW, x : x + WINDOW].ravel() for m in (a, b))
            c1, c2 = 2.55**2, 7.65**2
            cov = np.cov(p, q)
            top = (2 * p.mean() * q.mean() + c1) * (2 * cov[0, 1] + c2)
            values.append(top / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
    return float(np.mean(values))


def test_ssim_is_its_slow_twin() -> None:
    generator = np.random.default_rng(0)
    a = generator.uniform(0, 255, (12, 15))
    b = np.clip(a + generator.normal(0, 20, a.shape), 0, 255)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_psnr_of_a_known_difference_and_of_none() -> None:
    frame = np.full((16, 16, 3), 100, np.uint8)
    assert compare([frame], [frame]).psnr_db is None
    assert compare([frame], [frame + 1]).psnr_db == pytest.approx(48.1308, abs=1e-3)
    with pytest.raises(ValueError):
        compare([frame], [])
