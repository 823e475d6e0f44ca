"""Job folders, sidecars and requests from strangers: one line, or as if they were not there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omniavatar.config.load import load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.encoders.input_limits import InputLimits
from omniavatar.engine.job import Job, fingerprint
from omniavatar.engine.prepare import read_inputs
from omniavatar.engine.requests_file import RequestLine
from omniavatar.engine.targets import checked_output
from omniavatar.errors import CheckpointError, InputError, ResourceError, ResumeError, TargetError
from omniavatar.media.atomic import atomic_write_json
from omniavatar.serve.batch.items import Verdict
from omniavatar.serve.batch.pipelines import make_items
from omniavatar.serve.batch.worker import error_outcome
from omniavatar.types import AvatarRequest

RECORDS = [
    '{"format": 1, "don/e": 2, "fingerprint": {"a": "1"}}',
    '{"format": 1, "done": -1, "fingerprint": {}}',
    '{"format": 1, "done": true, "fingerprint": {}}',
    '{"format": 1, "done": "2", "fingerprint": {}}',
    '{"format": 1, "done": 1e999, "fingerprint": {}}',
    '{"format": 1, "done": 1, "fingerprint": [1]}',
    '{"format": 1, "done": 1, "fingerprint": {"a": {"b": 1}}}',
    '{"format": 1, "done": 1}',
    '{"format": 2, "done": 1, "fingerprint": {}}',
    '{"done": 1, "done": 2}',
    "[" * 100_000,
    "[]",
    "null",
    "",
    "\x00",
]


@pytest.mark.parametrize("content", RECORDS)
def test_a_damaged_job_is_one_line(tmp_path: Path, content: str) -> None:
    job = Job(tmp_path / "o.mp4")
    job.folder.mkdir()
    (job.folder / "job.json").write_text(content)
    assert job.recorded(["b", "quantize"]) == {}
    with pytest.raises(ResumeError, match="use --no-resume to start over") as caught:
        job.open({"a": "1"}, resume=True)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(job.folder))


@pytest.mark.parametrize(
    "content",
    [
        '{"fingerprint": {"a": "1"}, "bytes": 1}',
        '{"fingerprint": {"a": "1"}, "bytes": 1, "windows": "x"}',
        *RECORDS,
    ],
)
def test_a_damaged_sidecar_counts_as_none(tmp_path: Path, content: str) -> None:
    job = Job(tmp_path / "o.mp4")
    job.output.write_bytes(b"x")
    job.sidecar.write_text(content)
    assert job.finished({"a": "1"}) is None


def test_a_name_that_is_no_utf8_is_recorded(tmp_path: Path) -> None:
    name = "caf\udce9"
    atomic_write_json(tmp_path / "a.json", {"output": name, "prompt": "é"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"output": name, "prompt": "é"}
    assert "sha256" in fingerprint({"image": name * 100})["image"]
    job = Job(tmp_path / f"{name}.mp4")
    job.open(fingerprint({"output": name}), resume=True)
    assert Job(job.output).open(fingerprint({"output": name}), resume=True) == 0
    assert Job(job.output).recorded(["output"]) == {"output": name}


def test_a_name_that_cannot_be_an_output_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    for name in ("folder.mp4", ".mp4", "x.avi", f"{'x' * 252}.mp4"):
        with pytest.raises(TargetError):
            checked_output(tmp_path / name)
    assert checked_output(tmp_path / f"{'x' * 251}.mp4")


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("\ud800", "prompt: holds half of a character"),
        ("caf\udce9", "prompt: holds a byte that is not UTF-8"),
        ("x" * 10_000_000, "prompt: has 10,000,000 bytes, the most is 65,536"),
        (None, "prompt: must be text"),
        (" ", "prompt: is empty"),
    ],
)
def test_a_prompt_of_a_library_call_is_checked(prompt: Any, problem: str) -> None:
    models: Any = SimpleNamespace(config=PipelineConfig(), dit_config=SimpleNamespace(audio_dim=0))
    with pytest.raises(InputError, match=problem):
        read_inputs(models, AvatarRequest(prompt, np.zeros((16, 16, 3), np.uint8)))


@pytest.mark.parametrize(
    ("error", "verdict", "name"),
    [
        (TargetError("x: is a folder"), Verdict.failed, "TargetError"),
        (MemoryError(), Verdict.retry, ResourceError.__name__),
        (OSError(28, "No space left on device", "x"), Verdict.retry, "OutputError"),
        (KeyError("x"), Verdict.broken, "KeyError"),
    ],
)
def test_what_an_error_means_for_an_item(error: Exception, verdict: Verdict, name: str) -> None:
    outcome = error_outcome(error, 0.0)
    assert (outcome.verdict, outcome.error_class) == (verdict, name)


def test_a_file_that_vanished_fails_only_its_item(tmp_path: Path) -> None:
    config = load_config(None, {"weights": "random", "scale": "nano"}).config
    (tmp_path / "b.png").touch()
    lines = [RequestLine(n, n + 1, "p", tmp_path / name, None) for n, name in enumerate(("a.png", "b.png"))]
    gone, kept = make_items(lines, config)
    assert gone.problem is not None and gone.problem.startswith(
        f"line 1: {tmp_path / 'a.png'}: cannot be read"
    )
    assert kept.problem is None


@pytest.mark.parametrize(
    "change",
    [
        {"head_bias": "x"},
        {"mean": [[1.0]]},
        {"mean": [1.0]},
        {"mean": ["a"]},
        {"components": [1, [2]]},
        {"head_bias": 10**30},
        {"head_bias": None},
        {"more": 1},
        {"format": 9},
    ],
)
def test_damaged_input_limits_are_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    from omniavatar.config.values import POCKET_WEIGHTS

    table = json.loads((POCKET_WEIGHTS / "input_limits.json").read_text())
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({**table, **change}))
    with pytest.raises(CheckpointError, match="correct input_limits or remove it"):
        InputLimits.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="correct input_limits or remove it"):
        InputLimits.load(path)
