"""The batch runner on real Ray processes, each of which is killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import processes
from batch_driver import drive, ray_cluster
from batch_stub import StubEngines, noted, video_bytes
from omniavatar.errors import CheckpointError, ResourceError
from omniavatar.serve.batch.events import ItemDone, ItemWindow
from omniavatar.types import Event

TESTS = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


MODULES = os.pathsep.join(path for path in sys.path if path)


@pytest.fixture(autouse=True)
def nothing_stays_behind(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Each run ends what it started; workers find the modules of the tests.

    The shared cluster keeps processes, and starts some when it likes, but none of them may be at work.
    """
    monkeypatch.setenv("PYTHONPATH", MODULES)
    shared = "cluster" in request.fixturenames
    before = {process.pid for process in ray_processes()}

    def left() -> list[psutil.Process]:
        new = [process for process in ray_processes() if process.pid not in before]
        if shared:
            return [process for process in new if "ray::IDLE" not in name_of(process)]
        return [process for process in new if parent_of(process) not in before]

    yield
    wait_for(lambda: not left())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray of two cores that tests share: starting one takes longer than most of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", MODULES)
        made = ray_cluster(2)
        made.wait_for_nodes()
    yield made.address
    made.shutdown()
    for process in ray_processes():  # Ray's own, which a loaded machine ends late
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_for(lambda: not ray_processes())


def ray_processes() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "ray" in name_of(p)]


def parent_of(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def states(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "run" / "items").glob("*.json")}


def check_videos(folder: Path, prompts: list[str], windows: int = 4) -> None:
    """Assert that videos equal those of an uninterrupted run, without partial files or double work."""
    for index, prompt in enumerate(prompts):
        assert (folder / "out" / f"{index:05d}.mp4").read_bytes() == video_bytes(prompt, windows)
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {f"{i:05d}{ending}" for i in range(len(prompts)) for ending in (".mp4", ".json")}
    assert not noted(folder / "notes", "collision")
    ends = noted(folder / "notes", "end")
    assert len(ends) == len(set(ends)), "a finished video was made again"


def worker_pids(folder: Path) -> list[int]:
    lines = (folder / "notes" / "log").read_text().splitlines()
    pids = {int(line.split()[2]) for line in lines if line.startswith("engine")}
    return [pid for pid in sorted(pids) if psutil.pid_exists(pid)]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError("timed out")


def at_once(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_a_batch_fails_where_it_must_and_a_second_run_does_only_the_rest(
    tmp_path: Path, cluster: str
) -> None:
    prompts = ["one", "bad two", "three", "oom four", "bug five", "full six", "seven"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "full").touch()
    result = drive(tmp_path, prompts, retries=1)
    figures = result.summary
    assert (figures["done"], figures["failed"], figures["remaining"]) == (3, 4, 0)
    found = states(tmp_path)
    assert {key for key, state in found.items() if state["state"] == "done"} == {"00000", "00002", "00006"}
    assert [found[k]["attempts"] for k in ("00001", "00003", "00004", "00005")] == [1, 2, 2, 2]
    assert "is broken" in found["00001"]["error"] and found["00001"]["error_class"] == "InputError"
    assert "GPU memory" in found["00003"]["error"]
    assert "Traceback" in found["00004"]["error"] and "illegal memory" in found["00004"]["error"]
    assert "disk is full" in found["00005"]["error"]
    assert not (tmp_path / "out" / "00005.mp4").exists()
    assert sum(row["starts"] for row in figures["workers"]) == 2 + 2, "a worker with a bug is replaced"
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == figures

    (tmp_path / "notes" / "full").unlink()
    (tmp_path / "out" / "00006.mp4").unlink()
    prompts[2] = "changed"
    made = noted(tmp_path / "notes", "begin")
    again = drive(tmp_path, prompts, retries=0, address=cluster).summary
    assert (again["done"], again["skipped"], again["failed"]) == (3, 1, 3)
    assert sorted(noted(tmp_path / "notes", "begin")[len(made) :]) == [f"0000{i}.mp4" for i in range(1, 7)]
    for index in (0, 5, 6):
        assert (tmp_path / "out" / f"0000{index}.mp4").read_bytes() == video_bytes(prompts[index])

    fresh = drive(tmp_path, ["one"], fresh=True, address=cluster)
    assert fresh.summary["done"] == 1 and len(noted(tmp_path / "notes", "begin")) == len(made) + 7


def test_killed_worker_costs_only_the_window_it_was_at(tmp_path: Path, cluster: str) -> None:
    prompts = [f"p{i}" for i in range(8)]
    engines = StubEngines(tmp_path / "notes", windows=6, seconds=0.1)

    def kill() -> None:
        wait_for(lambda: len(noted(tmp_path / "notes", "window")) > 8)
        os.kill(worker_pids(tmp_path)[0], signal.SIGKILL)

    killer = at_once(kill)
    windows: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, ItemWindow):
            assert event.windows == 6
            windows.append(event.window)

    result = drive(tmp_path, prompts, engines=engines, event=listen, address=cluster)
    killer.join()
    assert set(windows) >= {1, 2, 3, 4}
    assert result.summary["failed"] == 0 and result.summary["done"] == 8
    assert sum(row["lost"] for row in result.summary["workers"]) == 1
    check_videos(tmp_path, prompts, windows=6)
    assert len(noted(tmp_path / "notes", "window")) <= 8 * 6 + 1, "only the cut window is made again"
    assert sorted(state["attempts"] for state in states(tmp_path).values()) == [1] * 7 + [2]


@pytest.mark.parametrize(("name", "windows"), [("raylet", 0), ("gcs_server", 3), ("ray::RuntimeEnvAgent", 3)])
def test_a_killed_process_of_ray_costs_one_line_and_the_batch_goes_on(
    tmp_path: Path, name: str, windows: int
) -> None:
    """`windows`: made before; with 0 the worker is about to start."""
    prompts = [f"p{i}" for i in range(4)]
    driver = start_driver(tmp_path, prompts=prompts, engine={"windows": 10, "seconds": 0.1}, workers=1)
    begun: list[psutil.Process] = []

    def found() -> bool:
        begun[:] = psutil.Process(driver.pid).children(recursive=True)
        names = [process.name() for process in begun]
        started = len(noted(tmp_path / "notes", "window")) >= windows
        return started and name in names and any(each.startswith("ray::Worker") for each in names)

    wait_for(found)
    killed = time.monotonic()
    next(process for process in begun if process.name() == name).kill()
    lines: list[dict[str, Any]] = []
    assert driver.stdout is not None
    while not lines or lines[-1]["event"] != "message":
        line = driver.stdout.readline()
        assert line, driver.communicate()[1]
        lines.append(json.loads(line))
    assert time.monotonic() - killed < 30
    assert "on this machine ended; starting it again" in lines[-1]["text"]
    output, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    last = json.loads(output.splitlines()[-1])
    assert last["event"] == "batch_finished" and last["done"] == 4 and last["failed"] == 0
    check_videos(tmp_path, prompts, windows=10)
    assert len(noted(tmp_path / "notes", "window")) <= 4 * 10 + 2, "only the cut windows are made again"
    assert not psutil.wait_procs(begun, 10)[1]


def start_driver(
    folder: Path, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    (folder / "notes").mkdir(exist_ok=True)
    arguments = [
        sys.executable,
        str(TESTS / "batch_driver.py"),
        json.dumps({"folder": str(folder), **options}),
    ]
    variables = {name: text for name, text in os.environ.items() if not name.startswith("RAY_AUTH")}
    variables |= environment or {}
    return processes.start(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=variables,
        start_new_session=True,
    )


def test_workers_end_with_a_killed_driver_and_a_second_run_finishes(tmp_path: Path, cluster: str) -> None:
    prompts = [f"p{i}" for i in range(10)]
    engine = {"windows": 6, "seconds": 0.1}
    driver = start_driver(tmp_path, prompts=prompts, engine=engine)
    wait_for(lambda: len(noted(tmp_path / "notes", "end")) >= 2)
    pids = worker_pids(tmp_path)
    driver.kill()
    driver.communicate()
    finished = set(noted(tmp_path / "notes", "end"))
    begun = states(tmp_path)
    assert sorted(state["state"] for state in begun.values()).count("running") in (1, 2)
    result = drive(tmp_path, prompts, engines=StubEngines(tmp_path / "notes", **engine), address=cluster)
    assert result.summary["done"] + result.summary["skipped"] == 10
    assert result.summary["skipped"] >= len(finished) - 2
    check_videos(tmp_path, prompts, windows=6)
    assert len(noted(tmp_path / "notes", "window")) <= 10 * 6 + 2, "only the cut windows are made again"
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30)


def test_ctrl_c_keeps_finished_windows(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, prompts=["slow p"], engine={"windows": 30, "seconds": 0.1}, workers=1)
    wait_for(lambda: len(noted(tmp_path / "notes", "window")) >= 3)
    os.killpg(driver.pid, signal.SIGINT)  # a terminal sends it to Ray's processes too
    output, errors = driver.communicate(timeout=60)
    assert driver.returncode == 0, errors
    last = json.loads(output.splitlines()[-1])
    assert (
        last["event"] == "batch_finished" and last["stopped_by"] == "interrupted" and last["remaining"] == 1
    )
    state = states(tmp_path)["00000"]
    assert state["state"] == "queued" and state["windows"] == 30
    assert (tmp_path / "out" / "00000.mp4.job").stat().st_size >= 3 * 64


def test_a_second_driver_of_the_same_folder_is_refused(tmp_path: Path, cluster: str) -> None:
    from omniavatar.errors import OutputError

    token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    engine = {"windows": 100, "seconds": 0.1}
    driver = start_driver(tmp_path, token, prompts=["slow p"], engine=engine, workers=1, address=cluster)
    wait_for(lambda: (tmp_path / "run" / "driver.lock").exists() and noted(tmp_path / "notes", "window"))
    with pytest.raises(OutputError, match=f"process {driver.pid} on .* is running this batch"):
        drive(tmp_path, ["slow p"])
    driver.kill()
    driver.communicate()


def test_killed_node_of_a_cluster(tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(12)]
    cluster = ray_cluster(1)
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()

        def kill() -> None:
            wait_for(lambda: len(worker_pids(tmp_path)) == 2 and len(noted(tmp_path / "notes", "end")) >= 2)
            for processes in second.all_processes.values():
                for each in processes:
                    family = psutil.Process(each.process.pid)
                    for process in (*family.children(recursive=True), family):
                        process.kill()

        killer = at_once(kill)
        engines = StubEngines(tmp_path / "notes", windows=6, seconds=0.1)
        result = drive(tmp_path, prompts, engines=engines, workers=None, address=cluster.address)
        killer.join()
    finally:
        cluster.shutdown()
    assert len(result.summary["workers"]) == 2, "as many workers as the cluster can run"
    assert result.summary["done"] == 12 and result.summary["failed"] == 0
    assert sum(row["lost"] for row in result.summary["workers"]) == 1
    check_videos(tmp_path, prompts, windows=6)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_joining_a_cluster_by_ray_client(tmp_path: Path) -> None:
    """`ray start --head` as a process, and a driver that joins with `ray://` and the cluster's token."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="oa-", dir="/tmp")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}
    quiet["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # at high load, gRPC can kill the server that the head forks
    for name in ("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "TIMEOUT_FOR_SPECIFIC_SERVER_S"):
        quiet[name] = "100"  # a busy machine may need more than its 30
    arguments = ["start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false"]
    arguments += [f"--port={free_port()}", f"--ray-client-server-port={port}", f"--temp-dir={folder}"]
    ray = str(Path(sys.executable).with_name("ray"))
    with subprocess.Popen(
        [ray, *arguments],
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as head:
        try:
            wait_for(lambda: psutil.Process(head.pid).children() and answers(port))
            driver = start_driver(
                tmp_path,
                prompts=["a", "bad b", "c"],
                workers=None,
                address=f"ray://127.0.0.1:{port}",
                environment={"RAY_AUTH_TOKEN": quiet["RAY_AUTH_TOKEN"]},
            )
            output, errors = driver.communicate(timeout=150)
            errors += "".join(path.read_text() for path in Path(folder).glob("*/logs/ray_client_server*.err"))
        finally:
            family = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            psutil.wait_procs(family, timeout=20)
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(folder, ignore_errors=True)
    assert driver.returncode == 0, errors
    last = json.loads(output.splitlines()[-1])
    assert (last["done"], last["failed"], last["remaining"], len(last["workers"])) == (2, 1, 0, 1), (
        last,
        errors,
    )
    assert (tmp_path / "out" / "00002.mp4").read_bytes() == video_bytes("c")


@pytest.mark.parametrize(
    "message",
    [
        "Starting Ray client server failed. See ray_client_server_23000.err",
        "psutil.ZombieProcess: PID still exists but it's a zombie (pid=29651)",
    ],
)
@pytest.mark.parametrize("failures", [1, 9])
def test_joining_is_tried_again_where_the_head_could_not_start_a_server(failures: int, message: str) -> None:
    from omniavatar.serve.batch.ray_crew import join_cluster

    tried: list[str] = []

    class Head:
        @staticmethod
        def init(address: str, **settings: Any) -> None:
            tried.append(address)
            if len(tried) <= failures:
                raise RuntimeError(message)

    if failures == 1:
        join_cluster(Head, "auto")
        assert tried == ["auto"] * 2
    else:
        with pytest.raises(ResourceError, match=r"cannot join .*(client server failed|zombie)"):
            join_cluster(Head, "auto")
        assert tried == ["auto"] * 3


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


def test_weights_that_cannot_be_used_end_the_batch_with_their_error(tmp_path: Path, cluster: str) -> None:
    result = drive(tmp_path, ["weights a", "b", "c"], workers=1, address=cluster)
    assert isinstance(result.ledger.error, CheckpointError) and "missing shard" in str(result.ledger.error)
    assert result.summary["remaining"] == 2 and result.summary["failed"] == 1
    (tmp_path / "notes" / "no_engine").touch()
    result = drive(tmp_path, ["a", "b"], address=cluster)
    assert isinstance(result.ledger.error, CheckpointError)
    assert result.summary["remaining"] == 2 and result.summary["failed"] == 0


def test_unreachable_cluster_is_one_line(tmp_path: Path) -> None:
    result = drive(tmp_path, ["a"], address="127.0.0.1:1")
    assert isinstance(result.ledger.error, ResourceError) and "\n" not in str(result.ledger.error)
    assert "--ray-address 127.0.0.1:1" in str(result.ledger.error)


def test_failing_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = tmp_path / "failures"
    counter.write_text("2")
    monkeypatch.setenv("FLAKY_FAILURES", str(counter))
    url = f"flaky://{tmp_path}/far"
    prompts = ["a", "b", "c"]
    result = drive(tmp_path, prompts, workers=1, output=url)
    assert result.summary["done"] == 3, result.summary["failures"]
    far = tmp_path / "far"
    wanted = {f"0000{i}.{ending}" for i in range(3) for ending in ("mp4", "json")}
    assert {path.name for path in far.iterdir()} == wanted, "no partial file remains"
    assert [(far / f"0000{i}.mp4").read_bytes() for i in range(3)] == [video_bytes(p) for p in prompts]
    assert drive(tmp_path, prompts, output=url).summary["skipped"] == 3


def test_soak_of_200_items_with_random_kills(tmp_path: Path, cluster: str) -> None:
    prompts = [f"p{i}" for i in range(200)]
    engines = StubEngines(tmp_path / "notes", windows=4, seconds=0.01)
    dice = random.Random(7)
    stop = threading.Event()
    kills: list[int] = []

    def kill() -> None:
        while len(kills) < 8 and not stop.wait(dice.uniform(0.3, 0.9)):
            try:
                pids = worker_pids(tmp_path)
                os.kill(dice.choice(pids), signal.SIGKILL)
                kills.append(1)
            except (FileNotFoundError, IndexError, ProcessLookupError):
                continue

    killer = at_once(kill)
    result = drive(tmp_path, prompts, engines=engines, retries=20, address=cluster)
    stop.set()
    killer.join()
    assert len(kills) >= 3
    assert result.summary["done"] == 200 and result.summary["failed"] == 0
    assert 1 <= sum(row["lost"] for row in result.summary["workers"]) <= len(kills)
    check_videos(tmp_path, prompts)


def test_pauses_between_items_are_short_with_10000_queued_and_two_workers_do_twice_as_much(
    tmp_path: Path, cluster: str
) -> None:
    """Compares the pause of a worker between two queued items with a call of an actor that does nothing.

    Both slow down alike where other programs use the cores, which is what an absolute limit would measure.
    An idle machine has calls of 1 ms, pauses of 2 to 4 ms and a utilization of 0.99.
    One of five tries must succeed, since the load may change between call and pause.
    """
    tries = []
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        call = call_seconds(cluster)
        gap, use, apart = pauses_and_use(folder, cluster)
        tries.append((call, gap, use, apart))
        if gap < 0.01 + 6 * call and use > 2 * 0.9 and apart <= 2:
            return
    raise AssertionError(f"call, pause, workers at work, items more on one than on the other: {tries}")


def call_seconds(address: str, calls: int = 60) -> float:
    """Mean time of a call to a Ray actor that does nothing, when it comes after a pause."""
    with ray_session(address):
        idle = ray.remote(Idle).options(num_cpus=0).remote()
        ray.get(idle.answer.remote())
        spent = 0.0
        for _ in range(calls):
            time.sleep(0.02)
            began = time.perf_counter()
            ray.get(idle.answer.remote())
            spent += time.perf_counter() - began
    return spent / calls


class Idle:
    def answer(self) -> None:
        """Nothing to do."""


@contextlib.contextmanager
def ray_session(address: str) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def pauses_and_use(tmp_path: Path, cluster: str) -> tuple[float, float, int]:
    """Mean pause between items, sum of both utilizations, and difference of the item counts of two workers.

    10,000 items of 0.6 s are queued; the run stops after 20.
    """
    seconds, enough = 0.6, 20
    done: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, ItemDone):
            done.append(event.item)
            if len(done) == enough:
                raise KeyboardInterrupt

    engines = StubEngines(tmp_path / "notes", windows=1, seconds=seconds)
    result = drive(tmp_path, [f"p{i}" for i in range(10_000)], engines=engines, event=listen, address=cluster)
    figures = result.summary
    assert figures["stopped_by"] == "interrupted" and figures["remaining"] == 10_000 - enough
    first, second = figures["workers"]
    return (
        figures["mean_pause_seconds"],
        first["utilization"] + second["utilization"],
        abs(first["done"] - second["done"]),
    )
