"""The benchmark: projections, tips, reports, the page, one real measurement of the nano model."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import make_pipeline, voice
from omniavatar.assets import pocket
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError
from omniavatar.measure.benchmark.page import bar_chart, html_page
from omniavatar.measure.benchmark.parts import counts_of
from omniavatar.measure.benchmark.row import Options, measure
from omniavatar.measure.benchmark.rows import (
    BenchmarkResult,
    FailedRow,
    MeasuredRow,
    Row,
    Setup,
    SkippedRow,
    SparseAttention,
    as_dict,
    row_from_json,
)
from omniavatar.measure.benchmark.run import find_configs, measure_all
from omniavatar.measure.benchmark.summary import markdown
from omniavatar.measure.benchmark.tips import Tip, fewer_tokens, guide_tips
from omniavatar.measure.benchmark.whole import measure_whole
from omniavatar.measure.flops import forward_work
from omniavatar.measure.projection import (
    Counts,
    StartCosts,
    Timing,
    WindowCosts,
    held_by_writer,
    video_seconds,
)
from omniavatar.measure.quality import Quality
from omniavatar.plan.run import plan_run
from omniavatar.plan.steps import make_step_plan
from omniavatar.sampling.cache_constants import published_constants
from omniavatar.sampling.step_cache import compute_all

ROOT = Path(__file__).resolve().parents[3]
CONFIGS, RESULTS = ROOT / "configs", ROOT / "benchmarks" / "results"
SETUP = [field.name for field in fields(Setup)]
COSTS = WindowCosts(forward=1.0, skipped_forward=0.1, decode=3.0, encode=0.5, write=2.0)
START = StartCosts(portrait=0.25, audio_per_second=0.01)
COUNTS = Counts(windows=4, computed=20, skipped=10, last_share=0.5, audio_seconds=100.0)

# Projections


def test_a_video_is_its_windows_one_after_the_other() -> None:
    denoise = 2 * (10 * 1.0 + 5 * 0.1)
    expected = 0.25 + 1.0 + 3 * (denoise + 3.0 + 0.5) + (denoise + 1.5) + 2.0
    assert video_seconds(COSTS, START, COUNTS) == pytest.approx(expected)


def test_a_single_window_has_no_hand_over() -> None:
    assert video_seconds(COSTS, START, replace(COUNTS, windows=1)) == pytest.approx(1.25 + 21 + 1.5 + 2)


def test_a_slow_writer_is_waited_for() -> None:
    slow = replace(COSTS, write=100.0)
    assert video_seconds(slow, START, COUNTS) == pytest.approx(1.25 + 24.5 + 4 * 100)


def test_several_windows_are_written_at_once() -> None:
    slow = replace(COSTS, write=100.0, writers=5)
    assert video_seconds(slow, START, COUNTS) == pytest.approx(1.25 + 3 * 24.5 + 22.5 + 100)
    slower = replace(slow, writers=2)
    assert video_seconds(slower, START, COUNTS) == pytest.approx(1.25 + 24.5 + 3 * 50 + 100)
    assert held_by_writer(slower, COUNTS) and not held_by_writer(slow, COUNTS)


def test_sparse_forwards_have_a_time_of_their_own() -> None:
    costs, counts = replace(COSTS, sparse_forward=0.5), replace(COUNTS, sparse=12)
    assert video_seconds(COSTS, START, COUNTS) - video_seconds(costs, START, counts) == pytest.approx(
        4 * 12 * 0.5
    )


@pytest.mark.parametrize(
    ("quality", "text"),
    [
        (Quality(31.25, 0.9876, 5), "first window against dense attention: PSNR 31.2 dB, SSIM 0.9876"),
        (Quality(None, 1.0, 5), "PSNR equal, SSIM 1.0000"),
        (None, "what it loses shows with the model's own weights only"),
    ],
)
def test_a_row_says_what_sparse_attention_computes_and_loses(quality, text) -> None:
    found = SparseAttention(
        {"attention": "window", "step_shares": [1, 0.4, 0.4], "kept_share": 0.4}, "fa4", quality
    )
    assert found.text.startswith("sparse attention window by fa4: 2 steps compute 40.0% of the matrix; ")
    assert text in found.text


def test_timing_keeps_median_and_spread() -> None:
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0, 3)


def test_windows_are_those_of_the_plan() -> None:
    config = load_config(CONFIGS / "inference_1.3B_optimized.yaml").config
    plan = plan_run(config, (400, 720), 5 * 60 * 16000, compute_all(15))
    counts = counts_of(plan)
    assert counts.windows == len(plan.windows) and counts.computed == 2 * 15 and counts.skipped == 0
    assert 0 < counts.last_share <= 1


# Tips


def tips(**overrides: Any) -> dict[str, Tip]:
    config = load_config(CONFIGS / "inference_1.3B.yaml", overrides).config

    def seconds(changes: Any) -> float:
        plan = plan_run(changes, (400, 720), 5 * 60 * 16000, compute_all(changes.sampling.steps))
        share = changes.video.max_tokens / 30000
        costs = replace(COSTS, forward=0.5 * share**1.5, decode=1.5 * share)
        return video_seconds(costs, START, counts_of(plan))

    return {tip.tip: tip for tip in guide_tips(config, seconds)}


def test_tips_say_what_saves_and_what_does_not() -> None:
    found = tips()
    assert found["lower guidance"].verdict == "saves nothing"
    assert found["shorter seq_len (with audio)"].verdict == "saves nothing"
    for name in ("fewer steps", "no guidance"):
        verdict = found[name].verdict
        assert verdict.startswith("saves") and 40 <= int(verdict.split()[1].rstrip("%")) <= 50
    assert found["smaller overlap"].verdict.startswith("saves")
    few, none = found["distilled LoRA"], found["no guidance"]
    assert few.before - few.after == pytest.approx((none.before - none.after) * 96 / 50)
    assert found["fewer max_tokens"].change == "max_tokens 30000 to 20000"


def test_guidance_on_half_the_steps_saves_half_of_what_no_guidance_saves() -> None:
    found = tips(guidance_scale=4.5)
    half, none = found["guidance on part of the steps"], found["no guidance"]
    assert half.before == none.before
    assert half.before - half.after == pytest.approx((none.before - none.after) / 2)
    assert tips(guidance_scale=1)["guidance on part of the steps"].verdict == "saves nothing"


def test_the_documented_tips_are_what_the_plan_counts() -> None:
    """docs/measuring.md: five minutes, configs/inference_1.3B.yaml, operations of the DiT."""
    dit = scale_spec("1.3B").dit

    def operations(config: PipelineConfig) -> float:
        if config.sampling.cache_policy == "teacache":
            raise ConfigError("needs weights")
        step_plan = make_step_plan(config.sampling, published_constants("1.3B"), lambda: np.zeros(0))
        plan = plan_run(config, (400, 720), round(300.3 * 16000), step_plan)
        return plan.forwards * forward_work(dit, (plan.latent_frames, 50, 90)).total

    found = guide_tips(load_config(CONFIGS / "inference_1.3B.yaml").config, operations)
    text = (CONFIGS.parent / "docs" / "measuring.md").read_text()
    assert found[-1].tip == "few persistent parameters", "measured, not counted"
    for tip in found[1:-1]:
        assert f"| {tip.tip} | {tip.change} | {tip.verdict} |" in text


def test_a_tip_that_cannot_be_tried_says_why() -> None:
    def seconds(changes: Any) -> float:
        if changes.sampling.cache_policy == "teacache":
            raise ConfigError("no polynomial")
        return 1.0

    found = guide_tips(load_config(CONFIGS / "nano.yaml").config, seconds)
    assert found[0].verdict == "not tried" and found[0].note == "no polynomial"
    assert Tip("t", "c", 1.0, 1.2).verdict == "costs 20% more"


# Running


def test_configs_of_a_folder_in_order() -> None:
    names = [path.stem for path in find_configs([CONFIGS])]
    assert names == sorted(names) and "nano" in names
    with pytest.raises(ConfigError, match="no YAML config"):
        find_configs([CONFIGS / "none.yaml"])
    assert find_configs([Path("pocket"), Path("pocket-live")]) == [pocket.CONFIG, pocket.LIVE_CONFIG]


@pytest.fixture(scope="module")
def nano_row() -> MeasuredRow:
    options = Options(
        str(CONFIGS / "nano.yaml"),
        "",
        ("dit_path=nowhere.safetensors,device=cpu,max_tokens=56,image_sizes_720=[[64,64]]",),
        warm_up=0,
        repeats=1,
        forward_limit=1e6,
    )
    row = measure(options)
    assert isinstance(row, MeasuredRow)
    return row


def test_missing_weights_become_random_ones_and_the_row_says_so(nano_row: MeasuredRow) -> None:
    assert nano_row.status == "measured" and nano_row.weights == "random"
    assert "nowhere.safetensors" in nano_row.notes[0]
    assert nano_row.steps == nano_row.computed_steps == 4 and nano_row.pattern == "CCCC"
    assert [each.minutes for each in nano_row.projections] == [1.0, 5.0, 10.0]
    assert all(each.seconds == each.baseline_seconds > 0 for each in nano_row.projections)
    assert nano_row.timings["skipped_forward"].median < nano_row.timings["forward"].median
    assert nano_row.tips[-1].verdict == "saves nothing", "all of nano is less than the guide's number"
    cache = nano_row.tips[0]
    assert cache.tip == "step cache" and cache.verdict == "not tried"
    assert "random" in cache.note, "TeaCache's plan of random weights would be called useless"
    assert nano_row.full is None and "full" not in as_dict(nano_row)


def test_rows_survive_the_way_through_json(nano_row: MeasuredRow) -> None:
    assert row_from_json(json.dumps(as_dict(nano_row))) == nano_row
    setup = {name: getattr(nano_row, name) for name in SETUP}
    for row in (SkippedRow(**setup, reason="r"), FailedRow(config="c", name="n", reason="r")):
        assert row_from_json(json.dumps(as_dict(row))) == row


def test_rows_written_before_are_read_and_written_alike(nano_row: MeasuredRow) -> None:
    before = json.loads((RESULTS / "2026-11-26_h100_benchmark.json").read_text())
    rows = tuple(row_from_json(json.dumps(row)) for row in before["rows"])
    again = BenchmarkResult(before["warm_up"], before["repeats"], rows).as_dict()
    assert json.loads(json.dumps(again)) == before
    assert list(as_dict(nano_row)) == list(before["rows"][0])


def test_streaming_is_tried_last_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from omniavatar.measure.benchmark.parts import PartTimer

    resident: list[int] = []
    real = PartTimer.forward_timings

    def timed(self: PartTimer, plan: Any) -> dict[str, Timing]:
        resident.append(self.pipeline.models.residency.placement.memory.resident_blocks)
        seconds = 3.0 if resident[-1] == 0 else 1.0
        return {name: replace(timing, median=seconds) for name, timing in real(self, plan).items()}

    monkeypatch.setattr(PartTimer, "forward_timings", timed)
    settings = "weights=random,scale=nano,device=cpu,max_tokens=56,image_sizes_720=[[64,64]]"
    row = measure(Options(str(CONFIGS / "nano.yaml"), "", (settings,), 0, 1, forward_limit=1e6), persistent=0)
    assert isinstance(row, MeasuredRow) and resident == [6, 6, 0]
    tip = row.tips[-1]
    assert tip.change.startswith("num_persistent_param_in_dit to 0") and tip.after > tip.before
    assert row.memory["resident_blocks"] == 6


def test_tips_are_tried_without_a_step_cache_whose_plan_is_unknown() -> None:
    config = load_config(CONFIGS / "inference_1.3B_optimized.yaml").config
    assert config.sampling.cache_policy == "teacache"

    def seconds(changes: PipelineConfig) -> float:
        if changes.sampling.cache_policy == "teacache":
            raise ConfigError("its plan is not known")
        return float(changes.sampling.steps)

    for cached, tried in ((True, 2), (False, 9)):
        tips = guide_tips(config, seconds, cached)
        assert tips[0].verdict == "not tried" and tips[0].change == "teacache as configured"
        assert sum(tip.verdict != "not tried" for tip in tips) >= tried
    assert [tip.tip for tip in tips if tip.verdict == "not tried"] == ["step cache"]


def test_whole_videos_with_and_without_the_step_cache(
    nano_row: MeasuredRow, nano_checkpoint: Path, tmp_path: Path
) -> None:
    cache = {"step_cache": "magcache", "magcache_thresh": 10.0, "magcache_retention": 0.0, "num_steps": 4}
    pipeline = make_pipeline(nano_checkpoint, tmp_path, scale="1.3B", magcache_max_skip=1, **cache)
    whole = measure_whole(pipeline, voice(0.4), lambda audio: 2.0 * audio)
    assert whole.video_seconds == pytest.approx(0.7, abs=0.1) and whole.seconds > 0
    assert whole.predicted_seconds == pytest.approx(0.8)
    assert whole.baseline_seconds > 0 and whole.quality.psnr_db < 60
    assert whole.quality.frames == round(whole.video_seconds * 25)
    row = replace(nano_row, full=whole)
    assert row_from_json(json.dumps(as_dict(row))) == row
    assert "## Whole videos" in markdown(result_of(row)) and f"{whole.quality.ssim:.4f}" in markdown(
        result_of(row)
    )
    whole = measure_whole(make_pipeline(nano_checkpoint, tmp_path), voice(0.4), lambda audio: 1.0)
    assert whole.baseline_seconds is None and whole.quality is None
    assert "no step cache" in markdown(result_of(replace(nano_row, full=whole)))


def test_what_cannot_run_is_skipped_with_the_reason() -> None:
    row = measure(Options(str(CONFIGS / "nano.yaml"), "", ("device=cpu",), forward_limit=1e-9))
    assert isinstance(row, SkippedRow) and "one forward would take" in row.reason
    many = ("device=cpu,max_tokens=2000000000,weights=random,scale=14B",)
    row = measure(Options(str(CONFIGS / "nano.yaml"), "", many))
    assert isinstance(row, SkippedRow) and re.search(r"needs about \d+ GB, this machine has", row.reason)


@pytest.mark.slow
def test_a_config_with_an_error_is_a_row(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("num_stepz: 3\n")
    reported: list[str] = []
    (row,) = measure_all([bad], Options("", ""), reported.append)
    assert isinstance(row, FailedRow) and "num_stepz" in row.reason
    assert len(reported) == 2 and "failed" in reported[1]


# Reports


def result_of(*rows: Row) -> BenchmarkResult:
    return BenchmarkResult(0, 1, rows)


def with_speed(row: MeasuredRow, name: str, factor: float) -> MeasuredRow:
    projections = tuple(replace(each, seconds=each.seconds / factor) for each in row.projections)
    return replace(row, name=name, projections=projections)


def test_rows_rank_by_five_minutes_or_the_longest_projection(nano_row: MeasuredRow) -> None:
    assert nano_row.ranked.minutes == 5.0
    assert replace(nano_row, projections=nano_row.projections[::2]).ranked.minutes == 10.0


def test_reports_rank_by_the_five_minute_projection(nano_row: MeasuredRow) -> None:
    faster = with_speed(nano_row, "faster", 2.0)
    setup = {name: getattr(nano_row, name) for name in SETUP}
    skipped = SkippedRow(**{**setup, "config": "x.yaml"}, reason="needs <much> & more")
    result = result_of(nano_row, skipped, faster)
    assert [row.name for row in result.measured] == ["faster", "nano"]
    text = markdown(result)
    assert "| 1 | faster | nano | random | sdpa, none, fast | 4 of 4 | 2 |" in text and "2.00x" in text
    assert "x.yaml: skipped, needs <much> & more" in text and "saves nothing" in text
    page = html_page(result)
    assert page.startswith("<!DOCTYPE html>\n") and "http://" not in page.replace("http://www.w3.org", "")
    root = ElementTree.fromstring(page.split("\n", 1)[1])
    assert len(root.findall(".//{http://www.w3.org/2000/svg}svg")) == 2
    bars = root.findall(".//{http://www.w3.org/2000/svg}rect/{http://www.w3.org/2000/svg}title")
    assert len(bars) == 2 * 2 + 2 * 4
    assert "needs <much> & more" in "".join(root.itertext())


def test_a_page_without_measurements_is_still_a_page() -> None:
    row = FailedRow(config="x.yaml", name="x", reason="why")
    ElementTree.fromstring(html_page(result_of(row)).split("\n", 1)[1])


def test_bars_are_as_long_as_their_values() -> None:
    root = ElementTree.fromstring(bar_chart(["a", "b"], [("s", [1.0, 4.0])]))
    rects = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if len(r)]
    widths = [float(rect.attrib["width"]) for rect in rects]
    assert widths[1] == pytest.approx(4 * widths[0], rel=0.01)


def test_fewer_tokens_is_the_guides_step() -> None:
    assert fewer_tokens(load_config(CONFIGS / "inference.yaml").config) == 20000
