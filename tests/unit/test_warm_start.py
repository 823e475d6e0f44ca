"""A forked process of `warm_start` is like a new one: what it sees, how it ends, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from warm_start import FOLDER, finished, launch, started

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")]

TESTS = Path(__file__).parents[1]
SEEN = """
import json, os, resource, signal, sys, threading
main = sys.modules["__main__"]
numbers = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
streams = [sys.stdin, sys.stdout, sys.stderr]
opened = [number for number in range(3, 200) if os.path.lexists(f"/proc/self/fd/{number}")]
opened = [name for name in map(os.readlink, map("/proc/self/fd/{}".format, opened)) if name != sys.argv[0]]
print(json.dumps({
    "open": opened,
    "arguments": sys.argv, "original": sys.orig_argv[1:], "folder": os.getcwd(), "path": sys.path,
    "name": __name__, "main": main.__dict__ is globals(), "variables": dict(os.environ),
    "inherited": [os.environ.get("GIVEN"), os.popen("echo $GIVEN").read()],
    "handlers": [str(signal.getsignal(number)) for number in numbers],
    "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "threads": threading.active_count(), "flags": str(sys.flags),
    "limits": [resource.getrlimit(kind) for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)],
    "streams": [[s.encoding, s.errors, s.line_buffering, s.seekable(), s.fileno()] for s in streams],
    "same": [sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__],
    "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(),
    "umask": os.umask(0o22), "input": sys.stdin.read(),
}))
"""


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a process that has loaded next to nothing."""
    folder = tmp_path_factory.mktemp("light")
    server = launch(folder, os.getpid(), ["json"])
    yield folder
    server.kill()
    server.communicate()


@pytest.fixture(autouse=True)
def use_light(light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(light))


@pytest.mark.parametrize("apart", [{}, {"start_new_session": True}, {"process_group": 0}])
@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_process_sees_what_a_new_one_sees(kind: str, apart: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "seen").mkdir()
    script = tmp_path / "seen" / "__main__.py"
    script.write_text(SEEN)
    program = {"-c": ["-c", SEEN], "-m": ["-m", "seen"], "script": [str(script)]}[kind]
    variables = {**os.environ, "GIVEN": "é", "PYTHONPATH": f"{tmp_path}:/nowhere"}
    seen = []
    for run in (subprocess.run, finished):
        done = run(
            [sys.executable, *program, "a", "-b"],
            input="line\r\n",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=variables,
            **apart,
        )
        assert (done.returncode, done.stderr) == (0, "")
        seen.append(json.loads(done.stdout))
    new, forked = seen
    assert forked == new


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('reason')",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; print('lost', end=''); os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit; atexit.register(print, 'at exit'); print('printed')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        "import os; os.close(1); os.open('/dev/full', os.O_WRONLY); print('lost')",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print, args=(1,)); p.start();"
        "p.join(); print(p.exitcode)",
    ],
)
def test_a_process_ends_as_a_new_one_ends(code: str) -> None:
    command = [sys.executable, "-c", code]
    new, forked = (run(command, capture_output=True, text=True) for run in (subprocess.run, finished))
    assert (forked.returncode, forked.stdout) == (new.returncode, new.stdout)
    assert forked.stderr.splitlines()[-1:] == new.stderr.splitlines()[-1:]  # more frames are above


def test_each_process_has_other_random_numbers() -> None:
    command = [sys.executable, "-c", "import random; print(random.random())"]
    assert finished(command, capture_output=True).stdout != finished(command, capture_output=True).stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(number: signal.Signals) -> None:
    code = "import time; print('runs', flush=True); time.sleep(60)"
    with started([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"runs\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(20) == process.poll() == -number
        process.kill()  # it has ended: no other process gets the signal


def test_several_threads_may_wait_for_it() -> None:
    process = started([sys.executable, "-c", "import sys, time; time.sleep(0.2); sys.exit(3)"])
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: process.wait(20), range(4))) == [3] * 4


def test_the_streams_are_those_that_are_given(tmp_path: Path) -> None:
    code = "import sys; print(sys.stdin.read()); print('problem', file=sys.stderr)"
    with (tmp_path / "log").open("w") as log:
        both = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        assert finished([sys.executable, "-c", code], **both).returncode == 0
    assert sorted((tmp_path / "log").read_text().split()) == ["problem"]
    left = subprocess.PIPE, subprocess.DEVNULL
    done = finished(
        [sys.executable, "-c", code], input="x" * 300_000, text=True, stdout=left[0], stderr=left[1]
    )
    assert done.stdout == "x" * 300_000 + "\n" and done.stderr is None


def test_descriptors_are_passed_with_their_numbers() -> None:
    reading, writing = os.pipe()
    code = f"import os; os.write({writing}, b'passed'); os.get_inheritable({writing}) or os.abort()"
    for run in (subprocess.run, finished):
        assert run([sys.executable, "-c", code], pass_fds=[writing]).returncode == 0
        assert os.read(reading, 100) == b"passed"
    os.close(writing)
    os.close(reading)


def test_an_error_and_a_limit_of_time_are_those_of_subprocess() -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        finished([sys.executable, "-c", "import sys; sys.exit(4)"], check=True)
    assert failed.value.returncode == 4
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        finished([sys.executable, "-c", "import time; time.sleep(60)"], capture_output=True, timeout=0.1)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("arguments", "variables", "problem"),
    [
        (["-X", "dev", "-c", ""], {}, "-X: is an option"),
        (["-c", ""], {"PYTHONHASHSEED": "3"}, "PYTHONHASHSEED: is read only"),
        (["-c", ""], {"OMP_NUM_THREADS": "7"}, "OMP_NUM_THREADS: is read only"),
    ],
)
def test_what_a_fork_cannot_do_is_refused(
    arguments: list[str], variables: dict[str, str], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        started([sys.executable, *arguments], env={**os.environ, **variables})


def test_nothing_outlives_the_test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process ends when its `Process` is dropped, and all of them end with the owner."""
    code = "import time; print(1, flush=True); time.sleep(60)"
    process = started([sys.executable, "-c", code])
    pid = process.pid
    del process
    assert gone(pid)
    folder = tmp_path / "s"
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as owner:
        server = launch(folder, owner.pid, [])
        monkeypatch.setenv(FOLDER, str(folder))
        process = started([sys.executable, "-c", code])
        owner.kill()
    assert server.wait(20) == 0 and gone(process.pid) and not folder.exists()
    with pytest.raises(ValueError, match="the loaded process has ended"):
        process.wait(20)


WORKER = """
import sys; sys.path.insert(0, sys.argv[1])
import warm_start
warm_start.LOADED = ("json",)
warm_start.finished([sys.executable, "-c", "import os; print(os.getppid())"])
"""
RUN = """
import subprocess, sys
workers = [subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]) for _ in range(3)]
sys.exit(any([worker.wait() for worker in workers]))
"""


def test_the_workers_of_a_run_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER)
    variables = {**os.environ, "PYTEST_XDIST_TESTRUNUID": "a run", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", RUN, WORKER, str(TESTS)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    first, *others = map(int, run.stdout.split())
    assert others == [first, first] and gone(first) and not list(tmp_path.iterdir())


def gone(pid: int) -> bool:
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def test_a_fast_test_may_not_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit hook of conftest.py counts them with the other Python processes."""
    heard: list[object] = []
    monkeypatch.setattr(sys, "audit", lambda *event: heard.append(event[:2]))
    finished([sys.executable, "-c", ""])
    assert heard == [("subprocess.Popen", sys.executable)]
