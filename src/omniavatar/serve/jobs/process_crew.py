"""Workers as processes of this machine, one engine each: the crew of a server without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from omniavatar.parallel.launch import signal_name
from omniavatar.serve.batch.crew import Answered, Crew, Lost, News, Started
from omniavatar.serve.batch.items import Outcome, Progress, Seat, Stop
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.worker import JobEngine

PROCESS = "omniavatar.serve.jobs.process"
EXIT_S = 2.0
NICENESS = 10
"""How much nicer than the server its workers are, so that the API answers while they compute or start."""


class JobCrew(Crew, Protocol):
    """A crew whose workers can end a task early.

    ends_along: whether its workers end at once when this process dies.
    """

    ends_along: bool

    def stop(self, slot: int, how: Stop) -> None:
        """Have a busy worker end its task early; its answer follows."""
        ...


class ProcessCrew:
    """A `JobCrew`. factory: makes the engine of a worker; it and `files` are pickled."""

    ends_along = True

    def __init__(
        self, workers: int, factory: Callable[[Seat], JobEngine], files: JobFiles, seat: Seat | None = None
    ) -> None:
        self._workers, self._factory, self._files = workers, factory, files
        self._seat = seat or Seat(("cpu",))
        self._hired: dict[int, _Hired] = {}
        self._news: SimpleQueue[tuple[_Hired, News]] = SimpleQueue()

    @property
    def workers(self) -> int:
        return self._workers

    def hire(self, slot: int) -> None:
        ours, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-m", PROCESS, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,  # only the server handles signals of the terminal
        )
        theirs.close()
        lower_priority(process.pid)
        hired = self._hired[slot] = _Hired(slot, process, ours)
        with suppress(OSError):  # it died: the reader finds out
            ours.send((self._factory, self._seat, self._files, os.getcwd()))
        threading.Thread(target=self._read, args=(hired,), daemon=True).start()

    def give(self, slot: int, task: Any) -> None:
        self._hired[slot].progress = None
        self._hired[slot].send(task)

    def stop(self, slot: int, how: Stop) -> None:
        self._hired[slot].send(how)

    def dismiss(self, slot: int) -> None:
        hired = self._hired.pop(slot, None)
        if hired is not None:
            hired.process.kill()
            hired.process.wait()

    def wait(self, seconds: float) -> Sequence[News]:
        news: list[News] = []
        with suppress(Empty):
            while True:
                hired, each = self._news.get(timeout=0 if news else seconds)
                if self._hired.get(hired.slot) is hired:  # skips answers of dismissed workers
                    news.append(each)
        return news

    def progress(self, slots: Sequence[int]) -> Mapping[int, Progress]:
        found = {slot: self._hired[slot].progress for slot in slots if slot in self._hired}
        return {slot: progress for slot, progress in found.items() if progress is not None}

    def pids(self) -> dict[int, int]:
        """The processes by slot."""
        return {slot: hired.process.pid for slot, hired in self._hired.items()}

    def close(self) -> None:
        for slot in list(self._hired):
            self.dismiss(slot)

    def _read(self, hired: _Hired) -> None:
        """Pass on what a worker says until it ends."""
        started = False
        while True:
            try:
                message = hired.connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, Progress):
                hired.progress = message
            elif started:
                self._news.put((hired, Answered(hired.slot, message)))
            else:
                started = True
                self._news.put((hired, Started(hired.slot, message)))
            if isinstance(message, Outcome) and message.replace:
                return  # it ends by itself
        self._news.put((hired, Lost(hired.slot, hired.end())))


def lower_priority(pid: int) -> None:
    """Let a process that just started give way to this one; its threads follow.

    Linux weighs sessions before it looks at niceness, so the process must belong to the session of this one.
    """
    with suppress(ProcessLookupError):  # it died: the reader finds out
        os.setpriority(os.PRIO_PROCESS, pid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS))


class _Hired:
    """A worker's process."""

    def __init__(self, slot: int, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.slot, self.process, self.connection = slot, process, connection
        self.progress: Progress | None = None
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        with self._sending, suppress(OSError):  # it died: the reader finds out
            self.connection.send(message)

    def end(self) -> str:
        """How the process ended."""
        try:
            code = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "its process does not answer"
        if code >= 0:
            return f"its process ended with code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"its process was killed by {signal_name(-code)}{hint}"
