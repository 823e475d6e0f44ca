"""`python -m benchmarks NAME`: the list, an unknown name, every benchmark's help, two real runs on nano."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from benchmarks.__main__ import FOLDER, descriptions, main

from omniavatar.errors import InputError

ROOT = FOLDER.parent
SMALL = ["weights=random", "scale=nano", "device=cpu", "max_tokens=56", "image_sizes_720=[[64,64]]"]


def result_line(text: str) -> dict[str, object]:
    return json.loads(text.splitlines()[-1])


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    listed = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == listed
    lines = {line.split()[0]: line for line in listed.splitlines() if line.startswith("  ")}
    assert set(lines) == set(descriptions()) >= {"forward", "engine", "vae", "scaling", "busy", "deadline"}
    for name, text in descriptions().items():
        assert text.endswith((".", "?")) and lines[name].endswith(text)
    assert "-m benchmarks scaling" in listed


@pytest.mark.slow
def test_the_list_imports_no_benchmark() -> None:
    code = "import sys, benchmarks.__main__ as b; b.main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_an_unknown_name_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["scalling", "--help"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no benchmark is called scalling; nearest: scaling")


def test_an_error_of_the_engine_is_one_line_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check_video", "nowhere.mp4", "nowhere.wav"])
    assert ended.value.code == InputError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "nowhere.mp4" in line


@pytest.mark.parametrize("name", descriptions())
def test_every_benchmark_prints_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m benchmarks {name} ") and descriptions()[name] in shown
    assert f"-m benchmarks {name} " in shown.partition("\n\n")[2], "an example with the way to start it"


@pytest.mark.slow
def test_profile_overhead_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["profile_overhead", "--hp", *SMALL, "num_steps=1", "--repeats", "2", "--frames", "10"])
    shown = capsys.readouterr().out
    found = result_line(shown)
    assert found["benchmark"] == "profile_overhead" and found["device"] == "cpu" and found["calls"] > 10
    assert len(found["times"]["plain"]) == len(found["times"]["profiled"]) == 2
    assert "| profiled | " in shown


@pytest.mark.slow
def test_a_whole_video_runs_and_is_projected() -> None:
    """As a process, since it replaces the random decoder for good."""
    options = ["--config", "configs/nano.yaml", "--scale", "nano", "--minutes", "0.05", "--windows", "3"]
    command = [sys.executable, "-m", "benchmarks", "whole_video", *options, "--hp", *SMALL, "num_steps=1"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = result_line(done.stdout)
    assert found["projected"] and found["windows_measured"] == 3 < found["windows"]
    left_out = found["windows"] - found["windows_measured"]
    assert found["seconds"] == pytest.approx(found["measured_s"] + left_out * found["window_s"]["median"])
    assert found["gpu_peak_gib"] is None and found["hp"] == [*SMALL, "num_steps=1"]
