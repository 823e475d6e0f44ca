"""The parts of the batch runner one by one: leases, destinations, the worker, the options."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from batch_stub import StubEngines, make_items, noted, video_bytes
from command_line import NANO, REPOSITORY
from lease_holder import hold
from omniavatar.errors import BusyError, ConfigError, OutputError, ResourceError, TargetError
from omniavatar.serve.batch.destination import FolderDestination, RemoteDestination, make_destination
from omniavatar.serve.batch.events import (
    BatchStarted,
    ItemDone,
    ItemFailed,
    ItemStarted,
    ItemWindow,
    WorkerReady,
)
from omniavatar.serve.batch.items import Outcome, Seat, Task, Verdict, WorkerInfo, verdict_of
from omniavatar.serve.batch.ray_crew import Seats
from omniavatar.serve.batch.run_folder import RunFolder
from omniavatar.serve.batch.seats import WorkerOptions as Options
from omniavatar.serve.batch.seats import plan_workers, with_threads
from omniavatar.serve.batch.worker import Worker

# destinations


@pytest.mark.slow
def test_folder_removes_only_the_leftovers_of_killed_processes(tmp_path: Path) -> None:
    process = hold(tmp_path / ".00001.mp4.lock")
    for name in (".00000.mp4.lock", ".batch-0123", ".own.lock", "a.mp4"):
        (tmp_path / name).touch()
    destination = FolderDestination(tmp_path)
    with destination.prepared():
        destination.check()
        names = {path.name for path in tmp_path.iterdir()}
        assert {".00001.mp4.lock", ".own.lock", "a.mp4"} < names and len(names) == 4
        elsewhere = FolderDestination(tmp_path / "not_shared", destination.token)
        with pytest.raises(OutputError, match="does not see this folder"):
            elsewhere.check()
    assert {path.name for path in tmp_path.iterdir()} == {".00001.mp4.lock", ".own.lock", "a.mp4"}
    process.kill()
    process.communicate()


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    counter = tmp_path / "failures"
    counter.write_text("0")
    monkeypatch.setenv("FLAKY_FAILURES", str(counter))
    return counter


def remote(tmp_path: Path) -> RemoteDestination:
    return RemoteDestination(f"flaky://{tmp_path}/far", tmp_path / "work", tries=3, wait_s=0.001)


def staged(destination: RemoteDestination) -> None:
    destination.local("a.mp4").write_bytes(b"video")
    destination.local("a.json").write_text("{}")


def test_delivery_over_a_failing_network(tmp_path: Path, flaky: Path) -> None:
    destination = remote(tmp_path)
    with destination.prepared():
        staged(destination)
        flaky.write_text("2")
        assert destination.deliver("a.mp4", "one") == 5
        assert {path.name for path in (tmp_path / "far").iterdir()} == {"a.mp4", "a.json"}
        assert destination.sizes() == {"a.mp4": 5, "a.json": 2}
        assert not destination.local("a.mp4").exists()
        assert destination.delivered("a.mp4", "one") == 5
        assert destination.delivered("a.mp4", "two") is None
        (tmp_path / "far" / "a.mp4").write_bytes(b"cut")
        assert destination.delivered("a.mp4", "one") is None


def test_failed_delivery_keeps_the_video_and_leaves_no_partial_file(tmp_path: Path, flaky: Path) -> None:
    destination = remote(tmp_path)
    with destination.prepared():
        staged(destination)
        flaky.write_text("3")
        text = r"cannot upload a\.mp4 after 3 attempts .*the network went away"
        with pytest.raises(OutputError, match=text):
            destination.deliver("a.mp4", "one")
        assert destination.local("a.mp4").read_bytes() == b"video"
        assert list((tmp_path / "far").iterdir()) == []
        assert destination.deliver("a.mp4", "one") == 5


@pytest.mark.parametrize("name", ["a.mp4", "a.json"])
def test_a_users_file_at_a_url_is_not_replaced(tmp_path: Path, flaky: Path, name: str) -> None:
    destination = remote(tmp_path)
    with destination.prepared():
        destination.refuse_foreign("a.mp4")
        (tmp_path / "far" / name).write_text('{"mine": 1}')
        with pytest.raises(TargetError, match=f"{name}: exists at flaky://.*omniavatar did not write it"):
            destination.refuse_foreign("a.mp4")
        staged(destination)
        destination.refuse_foreign("a.mp4")  # the upload was cut off before its .json
        (tmp_path / "far" / "b.mp4").write_bytes(b"video")
        mark = {"fingerprint": {}, "versions": {"omniavatar": "0"}}
        (tmp_path / "far" / "b.json").write_text(json.dumps(mark))
        destination.refuse_foreign("b.mp4")


def test_a_folder_with_a_users_summary_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=r"summary\.json: was not written by omniavatar"):
        RunFolder(tmp_path).own()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(TargetError("x"), Verdict.failed), (BusyError("x"), Verdict.busy), (OutputError("x"), Verdict.retry)],
)
def test_what_an_error_of_the_output_means(error: OutputError, verdict: Verdict) -> None:
    assert verdict_of(error) is verdict


def test_unknown_protocol_is_one_line(tmp_path: Path) -> None:
    destination = make_destination("nothing9://bucket/folder", tmp_path)
    with pytest.raises(ConfigError, match="--output nothing9://bucket/folder"), destination.prepared():
        pass
    assert isinstance(make_destination("out", tmp_path), FolderDestination)


# the worker


def worker(tmp_path: Path) -> Worker:
    (tmp_path / "notes").mkdir(exist_ok=True)
    made = Worker(
        StubEngines(tmp_path / "notes"), Seat(("cpu",)), FolderDestination(tmp_path), str(Path.cwd())
    )
    return made


@pytest.mark.slow
def test_worker_makes_an_item_and_skips_one_that_another_process_makes(tmp_path: Path) -> None:
    first = worker(tmp_path)
    with FolderDestination.prepared(first._destination):
        info = first.start()
    assert isinstance(info, WorkerInfo) and (info.device, info.gpus) == ("stub", "")
    one, two, three = (Task(item, False) for item in make_items(["one", "two", "bad three"]))
    outcome = first.run(one)
    assert outcome.verdict is Verdict.done and outcome.size == len(video_bytes("one"))
    assert (tmp_path / "00000.mp4").read_bytes() == video_bytes("one")
    process = hold(tmp_path / ".00001.mp4.lock")
    busy = first.run(two)
    assert busy.verdict is Verdict.busy and f"process {process.pid}" in busy.error
    process.kill()
    process.communicate()
    assert first.run(two).verdict is Verdict.done
    failed = first.run(three)
    assert (failed.verdict, failed.error_class) == (Verdict.failed, "InputError")
    assert first.progress().key is None
    assert not list(tmp_path.glob(".*")), "every lease is released"


def test_worker_reports_why_it_cannot_start(tmp_path: Path) -> None:
    gone = Worker(StubEngines(tmp_path), Seat(("cpu",)), FolderDestination(tmp_path), str(tmp_path / "gone"))
    answer = gone.start()
    assert isinstance(answer, Outcome) and answer.error_class == "ConfigError"
    assert "does not have the folder in which the batch was started" in answer.error
    blind = Worker(StubEngines(tmp_path), Seat(("cpu",)), FolderDestination(tmp_path), str(Path.cwd()))
    answer = blind.start()
    assert isinstance(answer, Outcome) and "does not see" in answer.error


def test_video_delivered_just_before_a_kill_is_not_made_again(tmp_path: Path, flaky: Path) -> None:
    destination = remote(tmp_path)
    (tmp_path / "notes").mkdir()
    with destination.prepared():
        made = Worker(StubEngines(tmp_path / "notes"), Seat(("cpu",)), destination, str(Path.cwd()))
        made.start()
        task = Task(make_items(["one"])[0], False)
        assert made.run(task).verdict is Verdict.done
        again = made.run(task)
        assert again.verdict is Verdict.done and again.made is None
        assert noted(tmp_path / "notes", "end") == ["00000.mp4"]
        assert made.run(Task(task.item, True)).made is not None


# options


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


def four_gpus() -> tuple[str, ...]:
    return "4", "5", "6", "7"


@pytest.mark.parametrize(
    ("options", "seats", "workers"),
    [
        (Options(), Seats(("4", "5", "6", "7"), 1.0, 4), 4),
        (Options("all"), Seats(("4", "5", "6", "7"), 1.0, 4), 4),
        (Options("0,3", split_input=True), Seats(("4", "7"), 1.0, 8), 2),
        (Options("1,2"), Seats(("5",), 1.0, 16), 1),
        (Options("0", per_gpu_jobs=2), Seats(("4",), 0.5, 8), 2),
        (Options("cpu"), Seats((), 0, 1), 1),
        (Options("cpu", workers=3), Seats((), 0, 1), 3),
        (Options(ray_address="ray://h:1"), Seats((), 1.0, 1, "ray://h:1"), None),
        (Options("cpu", ray_address="auto", workers=5), Seats((), 0, 1, "auto"), 5),
        (Options(gpus_per_job=2), Seats(("4", "5", "6", "7"), 2.0, 8, devices=2), 2),
        (
            Options("0,1,3", split_input=True, gpus_per_job=3),
            Seats(("4", "5", "7"), 3.0, 16, devices=3),
            1,
        ),
        (Options("1,2", gpus_per_job=2), Seats(("5", "6"), 2.0, 16, devices=2), 1),
        (Options("cpu", workers=3, gpus_per_job=2), Seats((), 0, 2, devices=2), 3),
        (Options(ray_address="ray://h:1", gpus_per_job=4), Seats((), 4.0, 4, "ray://h:1", 4), None),
    ],
)
def test_seats(options: Options, seats: Seats, workers: int | None) -> None:
    plan = plan_workers(options, four_gpus)
    assert (plan.seats, plan.workers) == (seats, workers)
    assert bool(plan.notes) == (options == Options("1,2")), "a note names idle GPUs"


@pytest.mark.parametrize(
    ("options", "used", "note"),
    [
        (
            Options(gpus_per_job=3),
            ("4", "5", "6"),
            "GPUs 7 stay idle: --gpus-per-job 3 does not divide 4",
        ),
        (
            Options("0,1,3", gpus_per_job=2),
            ("4", "5"),
            "GPUs 7 stay idle: only GPU 4, 5 runs the queue; add --split_",
        ),
        (Options("0,1,3", split_input=True, gpus_per_job=2), ("4", "5"), "GPUs 7 .* does not divide 3"),
    ],
)
def test_gpus_that_no_job_can_use(options: Options, used: tuple[str, ...], note: str) -> None:
    plan = plan_workers(options, four_gpus)
    assert (plan.seats.gpus, plan.workers, len(plan.notes)) == (used, 1, 1)
    assert re.match(note, plan.notes[0]), plan.notes


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            Options("0,9", split_input=True),
            ResourceError,
            "this machine has no GPU 9; choose from 0 to 3",
        ),
        (Options("0,0"), ConfigError, "distinct numbers"),
        (Options("none"), ConfigError, "all, cpu, or distinct numbers"),
        (Options("0", workers=2), ConfigError, "--workers"),
        (Options("cpu", per_gpu_jobs=2), ConfigError, "--per_gpu_jobs"),
        (Options("0,1", ray_address="auto"), ConfigError, "cannot select GPUs of a cluster by number"),
        (Options(gpus_per_job=2, per_gpu_jobs=2), ConfigError, "--gpus-per-job, --per_gpu_jobs"),
        (Options(gpus_per_job=5), ResourceError, "--gpus-per-job 5: only 4 selected"),
        (Options("1", gpus_per_job=2), ResourceError, "--gpus-per-job 2: only 1 selected"),
    ],
)
def test_options_that_do_not_fit(options: Options, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan_workers(options, four_gpus)


def test_threads_of_workers_on_the_cpu() -> None:
    two = plan_workers(Options("cpu", workers=2))
    assert with_threads(two, 2, True, cores=4) == replace(two, seats=Seats((), 0, 2), pin=True)
    assert not with_threads(two, 2, False, cores=4).pin
    group = plan_workers(Options("cpu", workers=2, gpus_per_job=2))
    crowded = with_threads(group, 2, True, cores=4)
    assert crowded.seats == Seats((), 0, 4, devices=2) and not crowded.pin
    assert crowded.notes == ("8 threads share 4 cores: workers are not bound to cores",)
    on_ray = plan_workers(Options("cpu", ray_address="auto"))
    assert with_threads(on_ray, 8, True, cores=4).pin, "Ray counts the cores"
    on_gpu = plan_workers(Options("0"), four_gpus)
    assert with_threads(on_gpu, 8, True, cores=4) == on_gpu


BIND = """
import os, sys, threading
from pathlib import Path
from omniavatar.serve.batch.cores import take_cores
threading.Thread(target=sys.stdin.readline, daemon=True).start()
print(take_cores(int(sys.argv[2]), Path(sys.argv[1])), flush=True)
bound = {tuple(sorted(os.sched_getaffinity(int(thread)))) for thread in os.listdir("/proc/self/task")}
print(sorted(bound), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="binds processes to cores")
def test_workers_do_not_share_cores(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    holders: list[subprocess.Popen[str]] = []

    def take(count: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        command = [sys.executable, "-c", BIND, str(tmp_path), str(count)]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert holders[-1].stdout is not None
        taken, threads = (ast.literal_eval(holders[-1].stdout.readline()) for _ in range(2))
        return taken, threads

    everything = tuple(cores)
    assert take(len(cores) + 1) == ((), [everything])
    first = (cores[0],)
    assert take(1) == (first, [first])
    assert take(len(cores)) == ((), [everything]), "one of them is taken"
    holders[1].kill()
    holders[1].communicate()
    assert take(len(cores)) == (everything, [everything])
    for holder in holders:
        holder.kill()
        holder.communicate()


def test_without_a_gpu_the_error_suggests_the_cpu() -> None:
    with pytest.raises(ResourceError, match="use --gpus cpu --workers N"):
        plan_workers(Options("0"), lambda: ())


def test_devices_of_a_worker() -> None:
    assert Seats((), 0, 1).seat.devices == ("cpu",)
    assert Seats(("0",), 0.5, 1).seat.devices == ("cuda:0",)
    assert Seats(("0", "1"), 2, 2, devices=2).seat.devices == ("cuda:0", "cuda:1")
    assert Seats((), 0, 2, devices=2).seat.devices == ("cpu", "cpu")


def test_view_shows_workers_windows_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from omniavatar.cli.progress_batch import BatchView

    console = Console(file=io.StringIO(), width=120, highlight=False)
    view = BatchView(console)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    view(BatchStarted(items=5, queued=4, skipped=1, failed=0))
    view(WorkerReady(worker=0, host="node", device="H100", gpus="3"))
    view(ItemStarted("a", worker=0, attempt=1))
    now[0] += 60
    view(ItemDone("a", "a.mp4", worker=0, frames=50, resumed_windows=0, seconds=60.0))
    view(ItemStarted("b [x]", worker=0, attempt=1))
    view(ItemWindow("b [x]", worker=0, window=1, windows=2))
    now[0] += 30
    with console.capture() as captured:
        console.print(view._render())
    text = captured.get()
    assert "1 of 4 items, 0 failed, 0:02:30 left" in text, text
    assert "node GPU 3 H100" in text and "b [x]" in text and "1 of 2" in text and "0:00:30" in text
    view(ItemFailed("b", line=2, error="image: [red] broken", attempts=1))
    assert "image: [red] broken" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_missing_ray_is_one_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None\nfrom omniavatar.cli import main\nmain(sys.argv[1:])\n"
    (tmp_path / "face.png").touch()
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a", "image": "face.png"}))
    arguments = ["batch", "--config", NANO, "--input_file", str(tmp_path / "in.jsonl")]
    arguments += ["--gpus", "cpu", "--quiet", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 7
    assert done.stderr == (
        "error: omniavatar batch: the package ray is missing; pip install 'omniavatar[batch]'\n"
    )


@pytest.mark.slow
def test_the_guides_command_reports_a_missing_gpu() -> None:
    script = REPOSITORY / "scripts" / "parallel_inference.py"
    arguments = ["--config", "configs/inference_1.3B_optimized.yaml", "--input_file", "your_prompts.txt"]
    command = [sys.executable, str(script), *arguments, "--gpus", "0,1,2,3", "--split_input"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=hidden, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr == "error: --gpus: this machine has no CUDA device; use --gpus cpu --workers N\n"
