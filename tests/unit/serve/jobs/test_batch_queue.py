"""`omniavatar batch --queue`: the videos of a batch are jobs of the one queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from command_line import NANO, error_lines, run
from engine import portrait
from job_stub import noted
from omniavatar.serve.jobs.records import LOCAL_KEY, JobStatus
from queue_place import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    made.store.close()


def batch(place: Place, folder: Path, *more: str) -> Any:
    given = ["--input_file", str(folder / "in.jsonl"), "--output", str(folder / "out")]
    queue = ["--queue", place.url, "--queue-files", place.files.place, "--queue-model", "pocket"]
    return run("batch", "--config", NANO, *given, *queue, "--json", *more)


def write_requests(folder: Path, *lines: dict[str, Any]) -> None:
    PIL.Image.fromarray(portrait()).save(folder / "face.png")
    rows = [{"image": str(folder / "face.png"), **line} for line in lines]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_batch_gives_its_videos_to_the_queue_and_fetches_them(place: Place, tmp_path: Path) -> None:
    write_requests(
        tmp_path,
        {"prompt": "a person speaks", "seed": 7, "output": "a.mp4"},
        {"prompt": "bad picture", "output": "b.mp4"},
        {"prompt": "a person sings", "output": "c.mp4"},
    )
    with place.workers():
        result = batch(place, tmp_path, "--priority", "3", "--hp", "num_steps=3")
    assert result.exit_code == 1, result.output
    summary = json.loads(result.stdout)
    assert (summary["done"], summary["failed"]) == (2, 1)
    jobs = {job.spec.prompt: job for job in place.store.list(LOCAL_KEY).jobs}
    assert jobs["a person speaks"].spec.settings["seed"] == 7
    assert {job.priority for job in jobs.values()} == {3}
    assert {job.spec.settings["num_steps"] for job in jobs.values()} == {3}
    for name in "ac":
        assert (tmp_path / "out" / f"{name}.mp4").read_bytes() == place.video.read_bytes()
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["output"] == f"{name}.mp4"
    state = json.loads(next((tmp_path / "out" / "batch_in" / "items").glob("b.json")).read_text())
    assert state["error"] == "image: is broken; give another"

    with place.workers():  # a failed one is tried again, a finished one is not
        assert batch(place, tmp_path, "--hp", "num_steps=3").exit_code == 1
    assert place.store.counts()[JobStatus.completed] == 2 and place.store.counts()[JobStatus.failed] == 1
    assert len(noted(place.notes, "end")) == 2


@pytest.mark.slow
def test_jobs_of_an_interrupted_batch_are_found_again(place: Place, tmp_path: Path) -> None:
    """The second batch, as after a kill of the first, finds the job that a worker has finished meanwhile."""
    write_requests(tmp_path, {"prompt": "a person speaks", "output": "a.mp4"})
    with place.workers():
        assert batch(place, tmp_path).exit_code == 0
    state = tmp_path / "out" / "batch_in" / "items" / "a.json"
    state.unlink()
    (tmp_path / "out" / "a.mp4").unlink()
    result = batch(place, tmp_path)  # no worker runs
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "a.mp4").read_bytes() == place.video.read_bytes()
    assert len(place.store.list(LOCAL_KEY).jobs) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--queue-model", "pocket"], "--queue-model: belongs to --queue"),
        (["--priority", "1"], "--priority: belongs to --queue"),
        (["--queue", "sqlite:///x.db"], "--queue: needs --queue-files and --queue-model"),
        (
            ["--queue", "sqlite:///x.db", "--queue-files", "f", "--queue-model", "m", "--workers", "2"],
            "--queue: the server's workers make the videos",
        ),
        (
            [
                "--queue",
                "sqlite:///x.db",
                "--queue-files",
                "f",
                "--queue-model",
                "m",
                "--hp",
                "max_tokens=900",
            ],
            "--hp max_tokens: does not reach the workers of a queue",
        ),
    ],
)
def test_options_that_would_be_lost_are_refused(tmp_path: Path, options: list[str], says: str) -> None:
    write_requests(tmp_path, {"prompt": "a person speaks"})
    result = run("batch", "--config", NANO, "--input_file", str(tmp_path / "in.jsonl"), *options)
    assert result.exit_code == 2
    assert len(error_lines(result)) == 1 and says in error_lines(result)[0]
