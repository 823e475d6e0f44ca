"""`omniavatar profile`, `benchmark` and `doctor` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from command_line import NANO, PORTRAIT, REPOSITORY, run
from engine import overrides
from omniavatar.measure.benchmark import run as benchmark_run
from omniavatar.measure.benchmark.rows import FailedRow


def hp(checkpoint: Path, folder: Path) -> str:
    values = overrides(checkpoint, folder / "cache", output_dir=str(folder / "out"), seq_len=20)
    return ",".join(
        f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in values.items()
    )


@pytest.fixture(scope="module")
def profiled(nano_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("profile")
    lines = folder / "requests.txt"
    lines.write_text(f"a person@@{PORTRAIT}\nno picture@@nowhere.png\n")
    files = [
        value for name in ("json", "trace", "torch") for value in (f"--{name}", str(folder / f"{name}.json"))
    ]
    settings = hp(nano_checkpoint, folder)
    return folder, run("profile", "-c", NANO, "--input_file", str(lines), "--hp", settings, *files)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_profile_reports_every_stage(profiled: tuple[Path, Result]) -> None:
    folder, result = profiled
    assert result.exit_code == 1, "one of the two lines cannot be read"
    assert "nowhere.png" in result.stderr and "denoising" in result.stdout
    report = read(folder / "json.json")
    stages = {row["name"]: row for row in report["stages"]}
    wanted = {"load_dit", "load_vae", "text", "image", "denoise", "vae_decode", "vae_encode", "video_write"}
    assert wanted <= set(stages) and stages["video_write"]["beside_the_model"]
    (request,) = report["requests"]
    assert request["windows"] == len(report["windows"]) == 2 and request["pattern"] == "CC"
    assert report["overall"]["forwards"] == 2 * 2 * 2 and report["overall"]["forwards_skipped"] == 0
    assert report["steps"]["compute"]["count"] == 4
    assert {row["name"] for row in report["work"]} == {"denoise", "vae_decode", "vae_encode"}
    assert report["ceilings"][0]["source"].startswith("probed just now")
    parts = sum(row["seconds"] for row in report["stages"] if not row["beside_the_model"])
    assert parts == pytest.approx(report["overall"]["seconds"])
    video = Path(request["output"])
    assert video.is_file() and video.parent == folder / "out" / "profile"


def test_profile_writes_both_traces(profiled: tuple[Path, Result]) -> None:
    folder, _ = profiled
    names = [event["name"] for event in read(folder / "trace.json")["traceEvents"]]
    assert names.count("denoise") == 2 and names.count("step 1 (compute)") == 2
    kernels = {event.get("name") for event in read(folder / "torch.json")["traceEvents"]}
    assert "aten::addmm" in kernels and read(folder / "json.json")["kernel_trace_window"] == 1


def test_profile_needs_complete_requests() -> None:
    assert run("profile", "-c", NANO, "--prompt", "a person").exit_code == 2
    assert run("profile", "-c", NANO, "--image", PORTRAIT).exit_code == 2


def test_benchmark_writes_three_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def measure_all(configs: Any, options: Any, report: Any) -> tuple[FailedRow, ...]:
        calls.append(options)
        return tuple(FailedRow(config=str(path), name=path.stem, reason="too large") for path in configs)

    monkeypatch.setattr(benchmark_run, "measure_all", measure_all)
    out = tmp_path / "out"
    result = run("benchmark", "--configs", NANO, "-o", str(out), "--minutes", "0.5,2", "--repeats", "3")
    assert result.exit_code == 1 and "no configuration could be measured" in result.stderr
    assert calls[0].minutes == (0.5, 2.0) and calls[0].repeats == 3
    assert read(out / "benchmark.json")["rows"][0]["reason"] == "too large"
    assert "too large" in (out / "benchmark.md").read_text() and (out / "benchmark.html").is_file()
    assert run("benchmark", "--configs", NANO, "-o", str(out), "--minutes", "x").exit_code == 2


def test_doctor_reports_the_machine(nano_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("dit_path: nowhere.safetensors\nscale: nano\n")
    result = run("doctor", "--configs", str(config), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert {"sdpa", "math"} <= set(found["attention"]["fp32"]["available"])
    assert found["devices"][-1]["name"] == "cpu" and found["devices"][-1]["total_bytes"] > 2**30
    assert all(codec["available"] for codec in found["codecs"] if codec["name"] in ("libx264", "aac"))
    assert found["encoder"]["auto"] == ("nvenc" if found["encoder"]["nvenc"] == "works" else "x264")
    assert found["configs"][0]["missing"] == ["nowhere.safetensors"] and not found["configs"][0]["ready"]
    assert "nowhere.safetensors" in found["problems"][0]
    assert set(found["memory_auto"]) == {"1.3B", "14B"}
    assert all(line.startswith("memory: ") for line in found["memory_auto"].values())
    text = run("doctor", "--configs", str(config)).stdout
    assert "not ready" in text and "attention backends" in text and "torch" in text


@pytest.mark.slow
@pytest.mark.parametrize("script", ["profile_inference.py", "speed_benchmark.py"])
def test_the_guides_scripts_start_from_any_folder(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "Usage" in done.stdout
