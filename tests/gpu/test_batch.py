"""`omniavatar batch` on GPUs: the nano model, every available GPU, each worker on its own device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from engine import overrides, portrait
from omniavatar.cli import app

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_gpu_gives_the_frames_of_one(nano_checkpoint: Path, tmp_path: Path, jobs: int) -> None:
    from PIL import Image

    pytest.importorskip("ray")
    Image.fromarray(portrait()).save(tmp_path / "face.png")
    lines = [{"prompt": f"take {i % 2}", "image": "face.png", "seed": i % 2} for i in range(8)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    values = {**overrides(nano_checkpoint, tmp_path / "cache"), "device": "cuda", "seq_len": 40}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--input_file", str(tmp_path / "in.jsonl")]
    arguments += ["--per_gpu_jobs", str(jobs), "--output", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, ["batch", *arguments])
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["done"] == 8
    gpus = [row["gpus"] for row in summary["workers"] if row["gpus"] is not None]
    assert len(set(gpus)) == min(torch.cuda.device_count(), 8) and len(gpus) == min(8, jobs * len(set(gpus)))
    made = sorted((tmp_path / "out").glob("*.mp4"))
    for index, path in enumerate(made):
        assert path.read_bytes() == made[index % 2].read_bytes(), "same seed, same video, on any GPU"
