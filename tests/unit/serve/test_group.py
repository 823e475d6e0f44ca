"""Workers of several processes: which processes die together, the reported error, and equal videos."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from batch_driver import drive
from batch_stub import StubEngines, fail_follower, make_items, noted, release_window, video_bytes
from engine import make_pipeline, overrides, portrait, voice
from media_files import write_audio
from omniavatar.cli import app
from omniavatar.config.load import load_config
from omniavatar.engine.orders import EndOrder, WindowsOrder
from omniavatar.errors import OutputError
from omniavatar.serve.batch.destination import FolderDestination
from omniavatar.serve.batch.events import WorkerLost
from omniavatar.serve.batch.group import GroupWorker
from omniavatar.serve.batch.items import Item, Outcome, Seat, Task, Verdict, WorkerInfo
from omniavatar.serve.batch.pipelines import AvatarEngine, AvatarEngines
from omniavatar.serve.batch.ray_crew import workers_fitting
from omniavatar.types import AvatarRequest, Event, SamplingParams

TWO = Seat(("cpu", "cpu"))


@pytest.fixture(autouse=True)
def no_rank_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    yield
    wait_until(lambda: not ranks_of(psutil.Process()))


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """Rank processes below `process`; skips those that are ending."""
    found = []
    for child in process.children(recursive=True):
        try:
            if "omniavatar.serve.batch.rank" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return found


def pids(notes: Path, role: str) -> list[int]:
    """Running processes that logged themselves as `role`."""
    log = notes / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    found = [int(line.split()[2]) for line in lines if line.split()[0] == role]
    return [pid for pid in found if psutil.pid_exists(pid)]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture
def group(tmp_path: Path, notes: Path) -> Iterator[Callable[..., GroupWorker]]:
    """Starts a group of two ranks that writes to `tmp_path`."""
    destination = FolderDestination(tmp_path)
    made: list[GroupWorker] = []

    def start(grace_s: float = 60, **engine: Any) -> GroupWorker:
        factory = pickle.dumps(StubEngines(notes, **engine))
        made.append(GroupWorker(factory, TWO, destination, str(Path.cwd()), grace_s))
        info = made[-1].start()
        assert isinstance(info, WorkerInfo) and info.pid in pids(notes, "engine"), info
        return made[-1]

    with destination.prepared():
        yield start
    for worker in made:
        worker._end()


def task(prompt: str) -> Task:
    return Task(make_items([prompt])[0], False)


def later(action: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_bad_item_does_not_affect_the_others(
    group: Callable[..., GroupWorker], tmp_path: Path, notes: Path
) -> None:
    worker = group(paced=True)
    answers: list[Outcome] = []
    running = later(lambda: answers.append(worker.run(task("one"))))
    for window in (1, 2, 3):
        release_window(notes, window)
        wait_until(lambda: worker.progress().window == window)  # noqa: B023
    for window in range(4, 13):
        release_window(notes, window)
    running.join()
    assert answers[0].verdict is Verdict.done and not answers[0].replace
    assert worker.progress().key is None
    assert (tmp_path / "00000.mp4").read_bytes() == video_bytes("one")
    bad = worker.run(Task(make_items(["x", "bad two"])[1], False))
    assert (bad.verdict, bad.error_class, bad.replace) == (Verdict.failed, "InputError", False)
    assert worker.run(Task(make_items(["x", "y", "three"])[2], False)).verdict is Verdict.done
    wait_until(lambda: noted(notes, "follower"))  # it may start later than the leader works
    assert len(noted(notes, "engine")) == len(noted(notes, "follower")) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("role", "rank"), [("engine", 0), ("follower", 1)])
def test_a_killed_process_ends_the_group_and_is_named(
    group: Callable[..., GroupWorker], notes: Path, role: str, rank: int
) -> None:
    worker = group(windows=10_000, seconds=0.1)

    def kill() -> None:
        wait_until(lambda: noted(notes, "window"))
        os.kill(wait_until(lambda: pids(notes, role))[0], signal.SIGKILL)

    later(kill)
    outcome = worker.run(task("one"))  # its windows would take minutes
    assert outcome.verdict is Verdict.lost and outcome.replace
    assert outcome.error.startswith(f"rank {rank}: its process was killed by SIGKILL"), outcome.error
    assert not pids(notes, "engine") and not pids(notes, "follower")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "prompt", "verdict", "text"),
    [
        ("oom", "one", Verdict.retry, "rank 1: max_tokens: 30000 needs more"),
        ("bug", "one", Verdict.broken, "illegal memory access was encountered on rank 1"),
        ("exit", "one", Verdict.lost, "rank 1: its process ended with code 3"),
        ("", "peer one", Verdict.lost, "lost contact with another process"),
        ("", "uneven one", Verdict.retry, "the disk is full"),
    ],
)
def test_what_ends_a_group(
    group: Callable[..., GroupWorker],
    notes: Path,
    trouble: str,
    prompt: str,
    verdict: Verdict,
    text: str,
) -> None:
    only_sign = trouble == "exit" or prompt == "peer one"  # nothing more telling follows: don't wait for it
    worker = group(grace_s=0.5 if only_sign else 60, windows=5 if prompt != "one" else 10_000, seconds=0.05)
    if trouble:
        fail_follower(notes, trouble)
    outcome = worker.run(task(prompt))
    assert outcome.verdict is verdict and outcome.replace and text in outcome.error, outcome
    assert not pids(notes, "engine") and not pids(notes, "follower")


@pytest.mark.slow
def test_the_cause_is_reported_and_not_the_error_it_causes_in_the_leader(
    group: Callable[..., GroupWorker], notes: Path
) -> None:
    worker = group(seconds=0.05)

    def fail_after_the_leader_complained() -> None:
        wait_until(lambda: noted(notes, "complaint"))
        time.sleep(0.5)  # for the complaint to travel
        fail_follower(notes, "oom")

    later(fail_after_the_leader_complained)
    outcome = worker.run(task("peer one"))
    assert outcome.verdict is Verdict.retry and outcome.error.startswith("rank 1: max_tokens"), outcome


@pytest.mark.slow
def test_a_group_that_cannot_start(tmp_path: Path, notes: Path) -> None:
    (notes / "no_engine").touch()
    destination = FolderDestination(tmp_path)
    with destination.prepared():
        worker = GroupWorker(pickle.dumps(StubEngines(notes)), TWO, destination, str(Path.cwd()))
        answer = worker.start()
        unreadable = GroupWorker(b"no pickle", TWO, destination, str(Path.cwd())).start()
    assert isinstance(unreadable, Outcome) and unreadable.verdict is Verdict.broken
    assert isinstance(answer, Outcome) and answer.error_class == "CheckpointError" and answer.replace
    gone = GroupWorker(b"", TWO, destination, str(tmp_path / "gone")).start()
    assert isinstance(gone, Outcome) and "does not have the folder" in gone.error


OWNER = """
import pickle, sys
from pathlib import Path
from batch_stub import StubEngines, make_items
from omniavatar.serve.batch.destination import FolderDestination
from omniavatar.serve.batch.group import GroupWorker
from omniavatar.serve.batch.items import Seat, Task
folder = Path(sys.argv[1])
destination = FolderDestination(folder)
engines = pickle.dumps(StubEngines(folder / "notes", windows=10_000, seconds=0.05))
with destination.prepared():
    worker = GroupWorker(engines, Seat(("cpu",) * 3), destination, ".")
    worker.start()
    worker.run(Task(make_items(["one"])[0], False))
"""


@pytest.mark.slow
def test_the_processes_end_with_the_one_that_started_them(tmp_path: Path, notes: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)])
    wait_until(lambda: noted(notes, "window") and len(noted(notes, "follower")) == 2)
    everyone = [psutil.Process(pid) for role in ("engine", "follower") for pid in pids(notes, role)]
    assert len(everyone) == 3
    owner.kill()
    owner.wait()
    _, alive = psutil.wait_procs(everyone, timeout=60)  # their windows would take minutes
    assert not alive


def test_workers_are_not_spread_over_nodes() -> None:
    assert workers_fitting([8, 8, 1], 2) == 8 and workers_fitting([3, 3], 2) == 2
    assert workers_fitting([1, 2], 0.5) == 6 and workers_fitting([1], 2) == 0


@pytest.mark.slow
def test_batch_in_which_each_process_of_a_group_is_killed_once(tmp_path: Path, notes: Path) -> None:
    """On Ray, kill a follower, the leader, and the actor that started both, each in the middle of an item."""
    prompts = [f"p{i}" for i in range(4)]
    engines = StubEngines(notes, windows=6, seconds=0.1)

    def actor() -> list[int]:
        return [parent.pid for pid in pids(notes, "engine")[-1:] if (parent := psutil.Process(pid).parent())]

    victims = (lambda: pids(notes, "follower")[-1:], lambda: pids(notes, "engine")[-1:], actor)

    def kill() -> None:
        for number, victim in enumerate(victims, start=1):
            wait_until(lambda: len(noted(notes, "window")) >= 7 * number)  # noqa: B023
            os.kill(wait_until(victim)[0], signal.SIGKILL)
            wait_until(lambda: len(noted(notes, "engine")) == number + 1)  # noqa: B023

    killer = later(kill)
    lost: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, WorkerLost):
            lost.append(event.reason)

    result = drive(tmp_path, prompts, engines=engines, workers=1, devices=2, event=listen)
    killer.join()
    assert (result.summary["done"], result.summary["failed"]) == (4, 0), result.summary
    assert lost[0].startswith("rank 1: its process was killed by SIGKILL")
    assert lost[1].startswith("rank 0: its process was killed by SIGKILL") and len(lost) == 3
    for index, prompt in enumerate(prompts):
        assert (tmp_path / "out" / f"{index:05d}.mp4").read_bytes() == video_bytes(prompt, 6)
    assert not noted(notes, "collision") and len(noted(notes, "end")) == 4
    assert len(noted(notes, "window")) <= 4 * 6 + 3, "only the cut windows are made again"
    wait_until(lambda: not pids(notes, "engine") and not pids(notes, "follower"))


# the real engine


def frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(int)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    Image.fromarray(portrait()).save(folder / "face.png")
    write_audio(folder / "voice.flac", voice(0.9).samples[None], 16000, "flac", "mono")
    return folder


@pytest.fixture(scope="module")
def alone(nano_checkpoint: Path, inputs: Path) -> Path:
    """The video that one process makes of the inputs."""
    request = AvatarRequest("a", inputs / "face.png", inputs / "voice.flac", SamplingParams(seed=1))
    pipeline = make_pipeline(nano_checkpoint, inputs / "cache", threads=1, crf=0)
    return pipeline.generate(request, inputs / "alone" / "a.mp4").output


def check_video(made: Path, alone: Path) -> None:
    """That it is the video of one process, within rounding."""
    apart = np.abs(frames(made) - frames(alone))
    assert (
        apart.max() <= 4 and (apart > 0).mean() < 1e-3
    )  # the ranks share the VAE's rows, and the conversion to YUV rounds
    sidecars = [json.loads(path.with_suffix(".json").read_text()) for path in (made, alone)]
    assert [sidecar["processes"] for sidecar in sidecars] == [2, 1]
    assert sidecars[0]["fingerprint"] == sidecars[1]["fingerprint"]


@pytest.mark.slow
def test_batch_of_videos_that_two_processes_make_together(
    nano_checkpoint: Path, inputs: Path, alone: Path
) -> None:
    (inputs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    lines = [
        {"prompt": "broken", "image": "broken.png"},
        {"prompt": "a", "image": "face.png", "audio": "voice.flac", "seed": 1},
    ]
    (inputs / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = overrides(nano_checkpoint, inputs / "cache", crf=0, output_dir=str(inputs))
    (inputs / "c.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(inputs / "c.yaml"), "--input_file", str(inputs / "in.jsonl"), "--json"]
    arguments += ["--gpus", "cpu", "--gpus-per-job", "2", "--output", str(inputs / "out")]
    result = CliRunner().invoke(app, ["batch", *arguments])
    summary = json.loads(result.stdout)
    assert (result.exit_code, summary["done"], summary["failed"]) == (1, 1, 1), result.stderr
    assert "broken.png" in summary["failures"][0]["error"]
    (row,) = summary["workers"]
    assert (row["device"], row["starts"], row["lost"]) == ("2 x cpu", 1, 0), "a bad item costs no worker"
    check_video(inputs / "out" / "001_a.mp4", alone)


@pytest.mark.slow
def test_video_resumes_after_one_of_two_processes_was_killed(
    nano_checkpoint: Path, inputs: Path, alone: Path
) -> None:
    config = load_config(None, overrides(nano_checkpoint, inputs / "cache", crf=0)).config
    engines = pickle.dumps(AvatarEngines(config))
    destination = FolderDestination(inputs)
    request = AvatarRequest("a", inputs / "face.png", inputs / "voice.flac", SamplingParams(seed=1))
    item = Task(Item("a", "a.mp4", 1, "a", "", request), False)
    job = inputs / "a.mp4.job" / "job.json"

    def kill() -> None:
        wait_until(lambda: job.exists() and json.loads(job.read_text() or "{}").get("done", 0) >= 1)
        os.kill(max(process.pid for process in ranks_of(psutil.Process())), signal.SIGKILL)

    with destination.prepared():
        first, second = (GroupWorker(engines, TWO, destination, str(Path.cwd())) for _ in range(2))
        first.start()
        later(kill)
        lost = first.run(item)
        assert lost.verdict is Verdict.lost and "rank 1: its process was killed by SIGKILL" in lost.error
        assert isinstance(second.start(), WorkerInfo)
        done = second.run(item)
        second._end()
    assert done.made is not None and 0 < done.made.resumed_windows < done.made.windows
    check_video(inputs / "a.mp4", alone)


def test_engine_is_intact_unless_the_others_were_inside_a_video(tmp_path: Path) -> None:
    class Team:
        last_order: Any = WindowsOrder.__new__(WindowsOrder)

    class Pipeline:
        def generate(self, request: AvatarRequest, output: Path, resume: bool | None, should_stop) -> None:
            team.last_order = orders.pop() if orders else team.last_order
            raise OutputError("cannot write x: the disk is full; free some space")

    team, orders = Team(), []
    engine = AvatarEngine(None, team, (), lambda *args, **kwargs: Pipeline())  # type: ignore[arg-type,return-value]

    def run() -> bool:
        with pytest.raises(OutputError):
            engine.run(AvatarRequest("a", "b.png"), tmp_path / "a.mp4", False, lambda done, windows: None)
        return engine.intact()

    assert run(), "the order of the video before does not count"
    orders.append(EndOrder())
    assert run()
    orders.append(WindowsOrder.__new__(WindowsOrder))
    assert not run()
