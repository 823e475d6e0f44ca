"""`omniavatar batch` on the nano checkpoint: real videos, and a worker killed in the middle of one."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

from engine import make_pipeline, overrides, portrait, voice
from media_files import write_audio
from omniavatar.cli import app
from omniavatar.types import AvatarRequest, SamplingParams

pytestmark = pytest.mark.slow
PROMPTS = ("a woman speaks", "a man speaks", "a child speaks")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    Image.fromarray(portrait()).save(folder / "face.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    write_audio(folder / "voice.flac", voice(1.2).samples[None], 16000, "flac", "mono")
    lines = [
        {"prompt": p, "image": "face.png", "audio": "voice.flac", "seed": i} for i, p in enumerate(PROMPTS)
    ]
    lines.insert(1, {"prompt": "broken", "image": "broken.png"})
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text-cache")


def batch(nano: Path, cache: Path, inputs: Path, output: str, *more: str) -> Result:
    config = inputs / "config.yaml"
    config.write_text(yaml.safe_dump({**overrides(nano, cache), "output_dir": str(inputs / "usual")}))
    arguments = ["batch", "--config", str(config), "--input_file", str(inputs / "in.jsonl"), "--gpus", "cpu"]
    arguments += ["--workers", "2", "--output", output, "--json", "--retries", "1", *more]
    return CliRunner().invoke(app, arguments)


def kill_the_worker_of(job: Path, over: threading.Event) -> None:
    """Kill a worker as soon as its video has two windows; give up when the batch is over."""
    while not over.wait(0.01):
        try:
            if json.loads((job / "job.json").read_text())["done"] >= 2:
                holder = json.loads(job.with_name(f".{job.stem}.lock").read_text())
                os.kill(holder["pid"], signal.SIGKILL)
                return
        except (FileNotFoundError, json.JSONDecodeError):
            continue


def test_batch_with_a_killed_worker_gives_the_same_videos(
    nano_checkpoint: Path, cache: Path, inputs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    over = threading.Event()
    job = output / "000_a-woman-speaks.mp4.job"
    killer = threading.Thread(target=kill_the_worker_of, args=(job, over))
    killer.start()
    result = batch(nano_checkpoint, cache, inputs, str(output))
    over.set()
    killer.join()
    summary = json.loads(result.stdout)
    assert result.exit_code == 1 and "1 of 4 items failed" in result.stderr
    assert (summary["done"], summary["failed"]) == (3, 1)
    assert sum(row["lost"] for row in summary["workers"]) == 1
    assert "broken.png" in summary["failures"][0]["error"] and summary["failures"][0]["line"] == 2
    assert summary["real_time_factor"] == pytest.approx(summary["wall_seconds"] / summary["video_seconds"])

    pipeline = make_pipeline(nano_checkpoint, cache, threads=1)
    for index, seed in ((0, 0), (2, 1), (3, 2)):
        request = AvatarRequest(
            PROMPTS[seed], inputs / "face.png", inputs / "voice.flac", SamplingParams(seed=seed)
        )
        whole = tmp_path / "whole" / f"{index}.mp4"
        pipeline.generate(request, whole)
        made = next(output.glob(f"{index:03d}_*.mp4"))
        assert made.read_bytes() == whole.read_bytes()
    state = json.loads((output / "batch_in" / "items" / "000_a-woman-speaks.json").read_text())
    assert (state["state"], state["attempts"], state["window"]) == ("done", 2, state["windows"])

    before = set(output.glob("*.mp4"))
    lines = (inputs / "in.jsonl").read_text().splitlines()
    (inputs / "two.jsonl").write_text("\n".join(lines[:2]))
    elsewhere = f"file://{tmp_path / 'elsewhere'}"
    rest = ("--input_file", str(inputs / "two.jsonl"), "--run-dir", str(tmp_path / "run"), "--workers", "1")
    again = batch(nano_checkpoint, cache, inputs, elsewhere, *rest)
    assert json.loads(again.stdout)["done"] == 1, "another destination, another run folder"
    again = batch(nano_checkpoint, cache, inputs, elsewhere, *rest)
    summary = json.loads(again.stdout)
    assert (again.exit_code, summary["skipped"], summary["failed"]) == (1, 1, 1)
    names = [path.name for path in (tmp_path / "elsewhere").glob("*.mp4")]
    assert names == ["000_a-woman-speaks.mp4"], "the same name, and no partial file"
    assert before == set(output.glob("*.mp4"))
    for process in psutil.Process().children(recursive=True):
        assert "ray" not in process.name(), "a Ray process is still running"
