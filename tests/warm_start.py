"""Python processes for tests that start at once: a process that has loaded the libraries forks.

`started` and `finished` stand in for `subprocess.Popen` and `subprocess.run` with `sys.executable` and a
module (`-m`), code (`-c`) or a script. All workers of a test run share the loaded process. It has one thread,
and ends with the run.

Use `subprocess` where the start is what a test checks: imports, entry points, launchers, options of Python,
limits of memory, process groups, closed streams, GPUs, variables that a library reads when it is loaded. One
test of each command starts it that way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

import warm_server
from warm_server import MOST_BYTES

LOADED = (
    "av",
    "ftfy",
    "numpy.typing",
    "omniavatar.accel.apply",
    "omniavatar.cli.main",
    "omniavatar.cli.progress",
    "omniavatar.encoders.audio",
    "omniavatar.encoders.text",
    "omniavatar.engine.loading",
    "omniavatar.engine.pipeline",
    "omniavatar.engine.writer",
    "omniavatar.serve.api.app",
    "omniavatar.serve.jobs.process_crew",
    "omniavatar.serve.jobs.workers",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "transformers.models.t5.tokenization_t5",
    "transformers.models.umt5.modeling_umt5",
    "transformers.models.wav2vec2.modeling_wav2vec2",
)
FOLDER = "OMNIAVATAR_WARM_START"
"""Environment variable with the folder of the loaded process, so that processes of tests find it too."""
_keep: list[subprocess.Popen[str]] = []


class Process:
    """A forked process, with the methods and values of `subprocess.Popen` that tests use."""

    def __init__(self, args: Sequence[str], server: socket.socket, pipes: Sequence[IO[Any] | None]) -> None:
        self.args, self._server = list(args), server
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | None = None
        self._one_waits = threading.Lock()
        self.pid = self._answer()

    def _answer(self) -> int:
        answer = json.loads(self._server.recv(MOST_BYTES) or '"the loaded process has ended"')
        if isinstance(answer, str):
            raise ValueError(answer)
        return int(answer)

    def wait(self, timeout: float | None = None) -> int:
        late = subprocess.TimeoutExpired(self.args, timeout or 0.0)
        if not self._one_waits.acquire(timeout=-1 if timeout is None else timeout):
            raise late
        try:
            if self.returncode is None:
                self._server.settimeout(timeout)
                self.returncode = self._answer()
                self._server.close()
        except (TimeoutError, BlockingIOError):
            raise late from None
        finally:
            self._one_waits.release()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """What it wrote to the pipes of stdout and stderr until it ended."""
        end = None if timeout is None else time.monotonic() + timeout
        threads = ThreadPoolExecutor(3)
        writing = threads.submit(_write, self.stdin, input)
        reads = [stream and threads.submit(stream.read) for stream in (self.stdout, self.stderr)]
        threads.shutdown(wait=False)
        self.wait(timeout)
        left = None if end is None else max(0.0, end - time.monotonic())
        writing.result(left)
        found = [read and read.result(left) for read in reads]
        return found[0], found[1]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()
        self.wait()


def _write(stream: IO[Any] | None, data: Any) -> None:
    if stream:
        with suppress(BrokenPipeError), stream:
            if data:
                stream.write(data)


def started(
    command: Sequence[object],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    text: bool = False,
    start_new_session: bool = False,
    process_group: int | None = None,
    pass_fds: Sequence[int] = (),
) -> Process:
    """Like `subprocess.Popen`, whose arguments they are. SIGINT has its default action in the process.

    Raises ValueError if a fork cannot be like a new process with this command or environment.
    """
    python, *arguments = map(os.fsdecode, command)  # type: ignore[arg-type]
    assert python == sys.executable
    if sys.platform != "linux":  # elsewhere libraries do not survive a fork
        options = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "text": text}
        options |= {"start_new_session": start_new_session, "process_group": process_group}
        options["pass_fds"] = pass_fds
        return subprocess.Popen([python, *arguments], cwd=cwd, env=env, **options)  # type: ignore[return-value]
    place = f"{loaded()}/socket"
    variables = dict(os.environ if env is None else env)
    sys.audit("subprocess.Popen", python, command, cwd, variables)
    theirs: list[int] = []
    ours: list[IO[Any] | None] = []
    try:
        for number, given in enumerate((stdin, stdout, stderr)):
            pair = _ends(given, number, theirs, text)
            theirs.append(pair[0])
            ours.append(pair[1])
        folder = os.path.abspath(cwd or os.getcwd())
        request: dict[str, Any] = {"arguments": arguments, "environment": variables, "folder": folder}
        request |= {"new_session": start_new_session, "group": process_group, "pass_fds": list(pass_fds)}
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        server.connect(place)
        socket.send_fds(server, [json.dumps(request).encode()], [*theirs, *pass_fds])
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    return Process([python, *arguments], server, ours)


def finished(
    command: Sequence[object],
    *,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Like `subprocess.run`, with the same arguments."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with started(command, **options) as process:
        try:
            out, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.wait(), out, errors)
    if check:
        done.check_returncode()
    return done


def _ends(given: Any, number: int, before: list[int], text: bool) -> tuple[int, IO[Any] | None]:
    """A descriptor for the process, and for PIPE the other end of the pipe."""
    if given == subprocess.PIPE:
        reading, writing = os.pipe()
        kind = "" if text else "b"
        return (reading, open(writing, f"w{kind}")) if number == 0 else (writing, open(reading, f"r{kind}"))
    if given == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR), None
    if given == subprocess.STDOUT:
        return os.dup(before[1]), None
    if given is None:
        return os.dup(number), None
    return os.dup(given if isinstance(given, int) else given.fileno()), None


def loaded() -> str:
    """The folder of the loaded process of this test run, which is started if none runs."""
    if FOLDER not in os.environ:
        run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
        if run is None:
            launch(folder := Path(tempfile.mkdtemp(prefix="warm")), os.getpid(), LOADED)
        else:
            folder = Path(tempfile.gettempdir()) / f"warm{run[:12]}"
            folder.mkdir(mode=0o700, exist_ok=True)
            with FileLock(folder / "lock"):
                if not (folder / "socket").exists():
                    launch(folder, os.getppid(), LOADED)
        os.environ[FOLDER] = str(folder)
    return os.environ[FOLDER]


def launch(folder: Path, owner: int, modules: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process that loads `modules`, forks for requests, and ends with the process `owner`."""
    command = [sys.executable, warm_server.__file__, str(folder), str(owner), *modules]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, process_group=0, cwd=folder, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", "see its error above"
    _keep.append(process)
    return process
