"""The programs in examples/: each one runs on the packaged model, and stays small and typed."""

from __future__ import annotations

import ast
import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from command_line import REPOSITORY
from omniavatar.assets import pocket
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.media.inspect import probe_video
from small_pocket import FRAMES, write_config, write_voice

FOLDER = REPOSITORY / "examples"
PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py"))
LARGEST = 60
PUBLIC = {"omniavatar", "omniavatar.engine.recorder"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("config") / "small.yaml"))


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_voice(tmp_path_factory.mktemp("voice") / "voice.wav"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a program of examples/ in a temporary folder and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def program(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return program


def test_every_program_is_run_by_a_test_here() -> None:
    source = Path(__file__).read_text()
    assert len(PROGRAMS) >= 5
    assert [
        name for name in PROGRAMS if f'run("{name}"' not in source.replace("run(\n        ", "run(")
    ] == []


def test_the_list_of_examples_names_every_file() -> None:
    listed = (FOLDER / "README.md").read_text()
    files = [path.name for path in FOLDER.iterdir() if path.is_file() and path.name != "README.md"]
    assert [name for name in files if f"`{name}`" not in listed] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_short_typed_and_use_public_names(name: str) -> None:
    source = (FOLDER / name).read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) < LARGEST
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            values = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg != "self"]
            values += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            untyped = [each.arg for each in values if each.annotation is None]
            assert not untyped and node.returns is not None, (node.name, untyped)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("omniavatar"):
            assert node.module in PUBLIC, node.module
        elif isinstance(node, ast.Import):
            assert not [each.name for each in node.names if each.name.startswith("omniavatar.")]


@pytest.mark.slow
def test_one_video(run, config: str, voice: str) -> None:
    printed = run("one_video.py", "--config", config, "--audio", voice, "--output", "a.mp4")
    assert probe_video(Path("a.mp4")).frames == FRAMES
    assert f"a.mp4: {FRAMES} frames" in printed and "a.json" in printed


def test_stream_frames(run, config: str, voice: str) -> None:
    printed = run("stream_frames.py", "--config", config, "--audio", voice, "--frames", "shown")
    names = sorted(path.name for path in Path("shown").iterdir())
    assert names == [f"{40 * number:08d}ms.png" for number in range(FRAMES)]
    with Image.open(Path("shown") / names[-1]) as last:
        assert last.size == (64, 64)
    assert f"window 1 of 1: {FRAMES} frames" in printed


def test_batch_with_progress(run, config: str, voice: str) -> None:
    rows = [
        ["name", "image", "audio", "prompt"],
        ["first", str(FOLDER / "head.png"), voice, "A person is talking"],
        ["broken", "nowhere.png", voice, "A person is talking"],
        ["last", str(FOLDER / "head.png"), voice, "A person is talking"],
    ]
    with open("jobs.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    printed = run("batch_with_progress.py", "jobs.csv", "videos", "--config", config)
    assert sorted(path.name for path in Path("videos").glob("*.mp4")) == ["first.mp4", "last.mp4"]
    assert printed.count("100%") == 2
    assert "broken failed: image nowhere.png does not exist" in printed and "failed: broken\n" in printed


def test_custom_recorder(run, config: str, voice: str) -> None:
    printed = run("custom_recorder.py", "--config", config, "--audio", voice, "--log", "log.jsonl")
    events = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert {"request_started", "window_started", "step", "window_finished"} < set(names)
    assert names[-1] == "request_finished" and events[-1]["frames"] == FRAMES
    assert all(event["time"] > 0 for event in events)
    seconds = [float(line.split()[0]) for line in printed.splitlines()]
    assert len(seconds) == 5 and seconds == sorted(seconds, reverse=True)


@pytest.mark.slow
def test_lora_four_steps(run, config: str, voice: str) -> None:
    layer = "blocks.0.ffn.0"
    with TensorFiles(pocket.FOLDER / "weights" / "dit.safetensors") as files:
        rows, columns = files.shape(f"{layer}.weight")
    generator = torch.Generator().manual_seed(0)
    pair = {
        f"diffusion_model.{layer}.lora_down.weight": torch.randn(4, columns, generator=generator),
        f"diffusion_model.{layer}.lora_up.weight": torch.randn(rows, 4, generator=generator),
    }
    save_file(pair, "lora.safetensors")
    arguments = (
        "lora.safetensors",
        "--config",
        config,
        "--image",
        str(FOLDER / "head.png"),
        "--audio",
        voice,
    )
    printed = run("lora_four_steps.py", *arguments)
    plan = json.loads(Path("four_steps.json").read_text())["plan"]
    assert plan["forwards"] == 4 and plan["steps"] == 4 and "1 windows" in printed
    weak = run("lora_four_steps.py", *arguments, "--strength", "0", "--output", "without.mp4")
    assert "without.mp4" in weak
    assert Path("four_steps.mp4").read_bytes() != Path("without.mp4").read_bytes()


def test_from_memory(run, config: str) -> None:
    printed = run("from_memory.py", "--config", config, "--seconds", "0.6", "--output", "a.gif")
    with Image.open("a.gif") as moving:
        assert moving.size == (64, 64) and moving.n_frames > 1
    assert f"a.gif: {FRAMES} frames" in printed


@pytest.mark.slow
def test_service(run, config: str, voice: str) -> None:
    printed = run("service.py", "--config", config, "--audio", voice)
    assert probe_video(Path("first.mp4")).frames == FRAMES
    assert "window 1, step 1 of" in printed and "broken.mp4 failed: image" in printed
    assert not Path("broken.mp4").exists()
