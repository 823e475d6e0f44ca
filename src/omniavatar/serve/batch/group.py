"""A worker of several processes, one a device, that make each video together.

This process computes nothing: it starts the others (`rank.py`), hands items to rank 0, and watches all of
them. That one is stuck in an exchange with a dead peer can so always be told from work, and ended. A process
that dies or fails ends them all, with one error: the first cause, not what the others make of it. When this
process dies, by kill -9 too, the others end with it. The file through which they find each other is one in
memory without a name (Linux), so nothing of a group is left on the disk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from omniavatar.parallel.launch import signal_name
from omniavatar.serve.batch.destination import Destination
from omniavatar.serve.batch.items import Member, Outcome, Place, Progress, Task, Verdict, WorkerInfo
from omniavatar.serve.batch.worker import enter, problem

RANK = "omniavatar.serve.batch.rank"
GRACE_S = 5.0
"""For the cause to be heard, once a process says that it has lost another."""
EXIT_S = 2.0
"""For a process to be gone after it hung up."""


class GroupWorker:
    """A `Worker` on several devices. factory: a pickled `GroupFactory`."""

    def __init__(self, factory: bytes, place: Place, destination: Destination, folder: str) -> None:
        self._factory, self._place, self._destination, self._folder = factory, place, destination, folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._talks: list[Connection] = []
        self._life: int | None = None
        self._progress = Progress(None, 0, 0)

    def start(self) -> WorkerInfo | Outcome:
        began = time.time()
        try:
            enter(self._folder)
            self._open()
            return self._answer(began)
        except Exception as error:
            self._end()
            return problem(error, began)

    def run(self, task: Task) -> Outcome:
        began = time.time()
        self._progress = Progress(task.item.key, 0, 0)
        try:
            with suppress(OSError):  # it is gone, and `_answer` says why
                self._talks[0].send(task)
            answer = self._answer(began)
            assert isinstance(answer, Outcome)
            return answer
        except Exception as error:
            self._end()
            return problem(error, began)
        finally:
            self._progress = Progress(None, 0, 0)

    def progress(self) -> Progress:
        return self._progress

    def _open(self) -> None:
        store, (pipe, self._life) = os.memfd_create("ranks"), os.pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        for _ in self._place.devices:
            ours, theirs = Pipe()
            command = [sys.executable, "-m", RANK, str(theirs.fileno()), str(pipe)]
            self._processes.append(
                subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(), pipe, store),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is the driver's
                )
            )
            theirs.close()
            self._talks.append(ours)
        os.close(pipe)
        os.close(store)
        for rank, talk in enumerate(self._talks):
            member = Member(self._place, rank, f"/proc/self/fd/{store}")
            with suppress(OSError):
                talk.send((member, self._factory, self._destination, self._folder))

    def _answer(self, began: float) -> WorkerInfo | Outcome:
        """What rank 0 answers, or what ended the group."""
        for rank, said in self._messages(None):
            if isinstance(said, Progress):
                self._progress = said
                continue
            if isinstance(said, WorkerInfo):
                return said
            answer = said
            if rank or answer is None or answer.verdict is Verdict.lost:
                answer = self._cause(rank, answer, began)
            if answer.replace:
                self._end()
            return answer
        raise AssertionError("the processes are silent without a time limit")

    def _messages(self, until: float | None) -> Iterator[tuple[int, WorkerInfo | Progress | Outcome | None]]:
        """What the processes say, in order; None where one has hung up. Ends at the time `until`."""
        open_talks = dict(zip(self._talks, range(len(self._talks)), strict=True))
        while open_talks:
            left = None if until is None else until - time.monotonic()
            ready = wait(list(open_talks), left) if left is None or left > 0 else []
            if not ready:
                return
            for talk in ready:
                assert isinstance(talk, Connection)
                try:
                    said = talk.recv()
                except (EOFError, OSError):
                    yield open_talks.pop(talk), None
                else:
                    yield open_talks[talk], said

    def _cause(self, rank: int, said: Outcome | None, began: float) -> Outcome:
        """Why the group can't go on. `said`: the first sign of it, by `rank`.

        A death by a signal and an error of a process's own are causes; that another is lost, or an exit
        without a word, is one only if nothing better is heard within the grace time.
        """
        weak: Outcome | None = None
        for each, what in chain([(rank, said)], self._messages(time.monotonic() + GRACE_S)):
            if isinstance(what, Progress | WorkerInfo):
                continue
            found = self._exit(each, began) if what is None else self._named(each, what)
            if found.verdict is not Verdict.lost or found.error_class == "Killed":
                return found
            weak = weak or found
        assert weak is not None
        return weak

    def _exit(self, rank: int, began: float) -> Outcome:
        """How the process of `rank`, which hung up, has ended."""
        try:
            code = self._processes[rank].wait(EXIT_S)
        except subprocess.TimeoutExpired:
            code = 0
        killed = code < 0
        how = f"was ended by {signal_name(-code)}" if killed else f"ended with code {code}"
        hint = " (host memory?)" if code == -signal.SIGKILL else ""
        text = f"{self._name(rank)}: its process {how}{hint}; finished windows are kept"
        kind = "Killed" if killed else "Exited"
        return Outcome(Verdict.lost, began, time.time(), error=text, error_class=kind, replace=True)

    def _named(self, rank: int, outcome: Outcome) -> Outcome:
        """A traceback keeps its telling line last."""
        if rank == 0:
            return outcome
        name, error = self._name(rank), outcome.error.strip()
        text = f"{error} on {name}" if outcome.verdict is Verdict.broken else f"{name}: {error}"
        return replace(outcome, error=text)

    def _name(self, rank: int) -> str:
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        on_gpu = self._place.devices[rank] != "cpu" and rank < len(gpus)
        return f"rank {rank} (GPU {gpus[rank]})" if on_gpu else f"rank {rank}"

    def _end(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for talk in self._talks:
            talk.close()
        if self._life is not None:
            os.close(self._life)
            self._life = None
        self._processes, self._talks = [], []
