"""`omniavatar web`: its settings, its models, and what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import processes
import small_pocket
from command_line import error_lines, run
from omniavatar.cli.serve import local_devices
from omniavatar.cli.web import ENDED, KEPT_S, live_form, models_of, page_settings
from omniavatar.config.load import load_config
from omniavatar.measure.times import PartTimes, measure_times, times_name
from omniavatar.plan.run import plan_run
from omniavatar.serve.settings import ServeSettings
from web_server import TIMES


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run("web", "--demo", "--no-browser", "--port", port, "--data-dir", str(tmp_path / "data"))
    (line,) = error_lines(result)
    assert result.exit_code == 7 and f"--port {port}: cannot be used" in line
    assert "choose another port" in line
    assert not (tmp_path / "data").exists()


def test_other_machines_are_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIAVATAR_SERVE_HOST", "0.0.0.0")
    (line,) = error_lines(run("web", "--demo", "--no-browser", "--port", "0"))
    assert "OMNIAVATAR_SERVE_HOST: web is for this machine only" in line and "omniavatar serve" in line


def test_a_missing_config_is_one_line() -> None:
    (line,) = error_lines(run("web", "-c", "none.yaml", "--no-browser", "--port", "0"))
    assert "none.yaml" in line


def test_the_pages_defaults_give_way_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = page_settings(7860, None)
    assert settings.keep_seconds == KEPT_S and settings.data_dir == Path("omniavatar_web")
    assert settings.host == "127.0.0.1" and settings.port == 7860
    monkeypatch.setenv("OMNIAVATAR_SERVE_KEEP_SECONDS", "60")
    monkeypatch.setenv("OMNIAVATAR_SERVE_DATA_DIR", "elsewhere")
    settings = page_settings(7860, None)
    assert settings.keep_seconds == 60 and settings.data_dir == Path("elsewhere")
    assert page_settings(7860, Path("given")).data_dir == Path("given")


def test_a_model_without_weights_is_one_line_at_the_start(tmp_path: Path) -> None:
    config = small_pocket.write_config(tmp_path / "small.yaml")
    config.write_text(config.read_text().replace("pocket:vae", "elsewhere/vae"))
    (line,) = error_lines(run("web", "-c", str(config), "--no-browser", "--port", "0"))
    assert "elsewhere/vae.safetensors: weight file of" in line and "omniavatar download" in line


def test_the_demo_begins_with_the_packaged_model_and_a_config_goes_first_without_it(tmp_path: Path) -> None:
    settings, small = ServeSettings(), small_pocket.write_config(tmp_path / "small.yaml")
    assert list(models_of(settings, [small], demo=True).configs) == ["pocket", "small"]
    assert list(models_of(settings, [small], demo=False).configs) == ["small", "pocket"]
    assert list(models_of(settings, [], demo=True).configs) == ["pocket"]
    assert models_of(settings, [], demo=True).configs["pocket"].runtime.threads is not None
    changed = models_of(settings, [small], demo=False, overrides=["crf=30"]).configs
    assert changed["small"].output.crf == 30 != changed["pocket"].output.crf, "settings are of the first one"


def test_talk_takes_the_packaged_student_for_the_packaged_model_only(tmp_path: Path) -> None:
    packaged = load_config("pocket", ["threads=1", "device=cpu"]).config
    live = live_form(packaged)
    assert live.sampling.causal and live.runtime == packaged.runtime
    assert live.model == load_config("pocket-live").config.model
    tuned = load_config("pocket", {"loras": [{"path": tmp_path / "mine.safetensors"}]}).config
    assert live_form(tuned) is tuned
    assert live_form(live) is live


@pytest.mark.parametrize(
    ("values", "devices"),
    [({}, ("cpu",)), ({"ray_address": "auto"}, ()), ({"gpus": "0,1"}, ()), ({"gpus": "all"}, ())],
)
def test_only_the_cpu_and_a_single_gpu_need_no_ray(values: dict[str, Any], devices: tuple[str, ...]) -> None:
    """Ray is installed here, so GPUs are left to it."""
    assert local_devices(ServeSettings(**values)) == devices


def test_times_of_parts_survive_their_file_and_grow_with_the_plan() -> None:
    assert PartTimes.parse(TIMES.text()) == TIMES
    pocket, fewer = load_config(Path("pocket")).config, load_config(Path("pocket"), ["num_steps=2"]).config
    plans = [plan_run(config, (64, 64), 64000) for config in (fewer, pocket)]
    assert 0 < TIMES.seconds(plans[0]) < TIMES.seconds(plans[1])
    assert times_name(pocket) != times_name(fewer) and times_name(pocket) == times_name(pocket)
    with pytest.raises((ValueError, KeyError, TypeError)):
        PartTimes.parse('{"window": {}}')


@pytest.mark.slow
def test_parts_of_a_model_are_timed(tmp_path: Path) -> None:
    config = load_config(small_pocket.write_config(tmp_path / "small.yaml")).config
    times = measure_times(config)
    assert min(times.window.forward, times.window.decode, times.start.audio_per_second) > 0
    assert times.pixels == 64 * 64 * 41 and times.tokens == 176


@pytest.mark.slow
def test_an_interrupt_ends_the_page_with_a_line_that_videos_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "omniavatar.cli", "web", "--demo", "--no-browser", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with processes.start(
        [*command, "--data-dir", str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as page:
        assert page.stdout is not None and "the page is at http://127.0.0.1:" in page.stdout.readline()
        begun = time.monotonic()
        page.send_signal(signal.SIGINT)
        _, problems = page.communicate(timeout=90)
    assert page.returncode == 0 and ENDED in problems and time.monotonic() - begun < 60
