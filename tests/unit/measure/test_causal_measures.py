"""Plan, profile, benchmark, deadline and calibrate with `sampler: causal`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from omniavatar.accel.attention.registry import create_attention
from omniavatar.accel.key_value_cache import KeyValueCache
from omniavatar.assets import PORTRAIT
from omniavatar.checkpoint.dit import random_dit
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.cli import app
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ConfigError, ResourceError
from omniavatar.measure import flops
from omniavatar.measure.benchmark.row import Options, measure
from omniavatar.measure.benchmark.rows import MeasuredRow
from omniavatar.measure.benchmark.tips import guide_tips
from omniavatar.measure.calibrate import calibrate
from omniavatar.measure.deadline import propose
from omniavatar.plan.placement import place
from omniavatar.plan.run import plan_run
from omniavatar.plan.sharing import shared_among
from omniavatar.plan.sizes import GB, cache_bytes
from omniavatar.sampling.step_cache import compute_all
from omniavatar.sampling.windows import plan_blocks
from omniavatar.types import AvatarRequest

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CPU = torch.device("cpu")
SMALL = (
    "sampler=causal,guidance_scale=1,num_steps=2,causal_block=2,causal_window=6,causal_sink=2,fps=16,"
    "weights=random,scale=nano,device=cpu,dtype=fp32,image_sizes_720=[[64,64]],preset=ultrafast"
)


def small() -> PipelineConfig:
    return load_config(None, [SMALL]).config


def livetalk() -> PipelineConfig:
    return load_config(CONFIGS / "livetalk.yaml").config


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("audio_frames", [0, 1, 7, 8, 9, 20, 61])
def test_blocks_cover_every_frame_once(block: int, audio_frames: int) -> None:
    windows = plan_blocks(audio_frames, block)
    shown = [window.first_new_frame + frame for window in windows for frame in range(window.new_frames)]
    assert shown == list(range(audio_frames + 1))
    assert all(window.latent_frames == block and window.new_frames > 0 for window in windows)
    assert [window.given_latents for window in windows] == [1] + [0] * (len(windows) - 1)


def test_the_released_students_plan() -> None:
    plan = plan_run(livetalk(), (512, 512), 300 * 16000, compute_all(4))
    assert (plan.tokens, plan.latent_frames, plan.frames) == (3072, 3, 4801)
    assert [window.length for window in plan.windows[:3]] == [9, 12, 12] and len(plan.windows) == 401
    assert plan.forwards == 5 * 401 and plan.padded_audio_frames == 9 + 400 * 12 - 1
    assert plan.schedule.timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
    assert plan.as_dict()["causal"] == {"block": 3, "window": 15, "sink": 9}


def test_the_cache_is_in_the_memory_plan() -> None:
    config, spec = small(), scale_spec("nano").dit
    plan = plan_run(config, (64, 64), 16000)
    assert plan.causal is not None
    dit = random_dit(
        spec,
        attention=create_attention("sdpa", CPU, torch.float32)[1],
        dtype=torch.float32,
        device="cpu",
        seed=0,
    )
    cache = KeyValueCache(dit, plan.causal, plan.tokens, torch.float32, CPU)
    assert cache.num_bytes == cache_bytes(spec, plan, 4) > 0
    larger = plan_run(changed(config, sampling={"causal_window": 12}), (64, 64), 16000)
    peaks = [place(config, spec, shape, "fast", CPU, None).run.held for shape in (plan, larger)]
    assert peaks[1] - peaks[0] == cache.num_bytes, "twice the window, twice the cache"


def test_the_released_student_fits_and_the_error_names_its_settings() -> None:
    config, spec = livetalk(), scale_spec("1.3B").dit
    plan = plan_run(config, (512, 512), 16000)
    placement = place(config, spec, plan, "fast", CPU, 20 * GB)
    assert placement.memory.resident_blocks == 30 and placement.memory.fits
    with pytest.raises(ResourceError, match="lower causal_window, use quantize=fp8"):
        place(config, spec, plan, "fast", CPU, GB)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("local_attn_size=15", "causal_window=15"),
        ("sink_size=9", "causal_sink=9"),
        ("num_frame_per_block=3", "causal_block=3"),
        ("denoising_step_list=[1000,500]", "timesteps"),
    ],
)
def test_names_of_other_programs_are_answered(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key .*; write --hp .?{key}"):
        load_config(None, [word])


def test_several_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpus: .*sampler: causal makes a video on one GPU"):
        shared_among(small(), 2, "--gpus: lists 2 GPUs")
    assert shared_among(small(), 1, "--gpus") == small()


def test_attention_over_the_cache_counts() -> None:
    spec = scale_spec("1.3B").dit
    alone, seen = (flops.forward_work(spec, (3, 64, 64), seen_frames=frames) for frames in (3, 15))
    assert alone == flops.forward_work(spec, (3, 64, 64))
    assert seen.matrix == alone.matrix
    assert seen.attention - alone.attention == 4 * 3072 * 12 * 1024 * 1536 * 30


def test_only_tips_that_it_can_follow_are_tried() -> None:
    assert [tip.tip for tip in guide_tips(small(), lambda config: 1.0)] == ["few persistent parameters"]


@pytest.mark.slow
def test_the_plan_from_the_command_line() -> None:
    run = CliRunner().invoke
    text = run(app, ["plan", "-c", str(CONFIGS / "livetalk.yaml"), "--minutes", "5"]).stdout
    words = " ".join(text.split())
    assert "401 blocks of 12 frames (the first: 9); each sees 15 latents, the video's first 9 among" in words
    report = json.loads(
        run(app, ["plan", "-c", str(CONFIGS / "livetalk.yaml"), "--minutes", "5", "--json"]).stdout
    )
    assert report["forwards"] == 5 * 401 and report["causal"]["window"] == 15


def test_there_is_nothing_to_calibrate() -> None:
    with pytest.raises(ConfigError, match="sampler: causal computes every step"):
        calibrate(small(), AvatarRequest("a person", "none.png", "none.wav"))


@pytest.mark.slow
def test_a_profile_counts_every_pass_and_the_video_as_one_clip(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("sampler: causal\n")
    settings = f"{SMALL},seq_len=22,output_dir={tmp_path}"
    arguments = ["profile", "-c", str(config), "--prompt", "a person", "--image", str(PORTRAIT)]
    result = CliRunner().invoke(app, [*arguments, "--hp", settings, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out.json").read_text())
    (request,) = report["requests"]
    assert (request["frames"], request["windows"], request["forwards"]) == (22, 4, 4 * 3)
    assert "causal" not in request
    work = {row["name"]: row["tflop"] * 1e12 for row in report["work"]}
    spec = scale_spec("nano")
    seen = [flops.forward_work(spec.dit, (2, 8, 8), seen_frames=frames).total for frames in (2, 4, 6, 6)]
    assert work["denoise"] == pytest.approx(3 * sum(seen))
    assert work["vae_decode"] == pytest.approx(flops.decode_work(spec.vae, (7, 8, 8)).total)


@pytest.mark.slow
def test_a_benchmark_row_and_a_deadline() -> None:
    """Both count one pass more a block, and what decoding a block takes; nothing is encoded again."""
    row = measure(Options(str(CONFIGS / "livetalk.yaml"), "", (SMALL,), warm_up=0, repeats=1, minutes=(0.1,)))
    assert isinstance(row, MeasuredRow)
    assert (row.tokens, row.window_length, row.steps, row.branches) == (32, 8, 2, 1)
    assert row.timings["encode"].median == row.timings["skipped_forward"].median == 0
    assert row.timings["forward"].median > 0 < row.timings["decode"].median
    assert row.window.denoise == pytest.approx(3 * row.timings["forward"].median)
    found = propose(small(), 0.1, 600, repeats=1)
    assert found.chosen is not None and found.chosen.settings == {}
    assert found.as_configured.forwards == 3 * len(plan_run(small(), (64, 64), round(6.3 * 16000)).windows)
