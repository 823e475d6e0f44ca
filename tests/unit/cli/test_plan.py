"""`omniavatar plan`: its numbers, from configurations, files and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import NANO, PORTRAIT, REPOSITORY, SPEECH, error_lines, run


def plan(*arguments: str) -> dict[str, Any]:
    result = run("plan", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def config(name: str) -> str:
    return str(REPOSITORY / "configs" / f"{name}.yaml")


def test_plan_of_five_minutes_with_the_fast_small_model() -> None:
    report = plan("--config", config("inference_1.3B_optimized"), "--minutes", "5")
    assert (report["window_length"], report["latent_frames"], report["tokens"]) == (53, 14, 15750)
    assert report["frames"] == 7509, "ceil(300.3 s x 25) after the portrait frame"
    assert report["windows"] == 157
    assert len(report["branches"]) == 2 and report["steps"] == 15


def test_plan_of_the_large_model_counts_its_weights() -> None:
    report = plan("--config", config("inference"), "--minutes", "0.1")
    assert (report["window_length"], report["tokens"]) == (105, 30375)
    assert report["memory"]["assumed_scale"] == "14B"
    assert 28e9 < report["memory"]["dit"] < 30e9
    assert report["pattern"] == "C" * 50 and report["forwards"] == 100 * report["windows"]


def test_plan_shows_the_placement_of_weights() -> None:
    large = ("--config", config("inference"), "--minutes", "0.1", "--hp")
    tight = plan(*large, "memory=10,fuse=true,vae=plain")["memory"]
    placed = tight["placement"]["memory"]
    assert 0 < placed["resident_blocks"] < 40 and placed["peak"] < 10e9
    assert f"{placed['resident_blocks']} of 40 blocks stay" in tight["choice"]
    table = run("plan", *large, "memory=10,fuse=true,vae=plain").stdout
    assert "of 10.0 GB" in " ".join(table.split())
    assert plan(*large, "num_persistent_param_in_dit=0")["memory"]["choice"].startswith("memory: 0 of 40")
    impossible = plan(*large, "memory=2")["memory"]
    assert impossible["placement"] is None and "GB are needed" in impossible["choice"]


def test_plan_of_a_silent_video_and_of_files() -> None:
    assert plan("--config", NANO)["frames"] == 50
    report = plan("--config", NANO, "--audio", SPEECH, "--image", PORTRAIT)
    assert report["size"] == [144, 144]
    assert report["frames"] == -(-(96800 + 4800) * 25 // 16000) + 1


def test_plan_predicts_teacache_if_the_weights_are_available(nano_checkpoint: Path) -> None:
    weights = f"dit_path={nano_checkpoint}/Wan2.1-T2V-nano/diffusion_pytorch_model.safetensors"
    weights += f",exp_path={nano_checkpoint}/OmniAvatar-nano,num_steps=10,tea_cache_l1_thresh=0.2"
    report = plan("--config", NANO, "--hp", f"{weights},teacache_coefficients=1.3B")
    assert len(report["pattern"]) == 10 and report["pattern"][0] == report["pattern"][-1] == "C"
    assert report["memory"]["assumed_scale"] is None
    without = plan("--config", NANO, "--hp", "tea_cache_l1_thresh=0.2,dit_path=none")
    assert without["pattern"] is None and "upper bound" in without["notes"][0]


def test_plan_table_is_readable() -> None:
    result = run("plan", "--config", config("inference_optimized"), "--minutes", "1")
    assert "18 latent frames, 20250 tokens" in result.stdout
    assert "not on this disk" in result.stdout


def test_plan_says_which_vae_runs() -> None:
    plain = ("--config", config("inference_1.3B_4steps"), "--minutes", "1")
    float8 = (*plain, "--hp", "vae=fp8")
    assert (plan(*plain)["vae"], plan(*float8)["vae"]) == ("auto", "fp8")
    assert "vae: fp8, which is not exact" in " ".join(run("plan", *float8).stdout.split())
    more = plan(*float8)["memory"]["vae"] / plan(*plain)["memory"]["vae"]
    assert more == 1.5, "a byte more for each weight in bf16"
    other = run("plan", *float8, "--hp", "decoder=taehv,decoder_path=x.pth")
    assert other.exit_code == 2 and "fp8 runs with decoder: full, not taehv" in error_lines(other)[0]


def test_plan_bad_input() -> None:
    missing = run("plan", "--config", NANO, "--audio", "none.mp3")
    assert missing.exit_code == 3 and "none.mp3" in error_lines(missing)[0]
    assert run("plan", "--config", NANO, "--audio", SPEECH, "--minutes", "1").exit_code == 2
