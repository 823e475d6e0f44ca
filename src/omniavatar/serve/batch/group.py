"""A worker made of several processes, one per device, that make each video together.

This process computes nothing. It starts the ranks (`rank.py`), gives items to rank 0 and watches all of them.
A rank blocked on a dead peer can therefore be told apart from a busy one, and is killed. If one rank dies or
fails, all are killed and the first cause is reported, not the errors that follow from it. If this process
dies, even by kill -9, the ranks end too. They find each other through an unnamed file in memory (Linux), so
a group leaves nothing on the disk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from omniavatar.parallel.launch import signal_name
from omniavatar.serve.batch.items import Member, Outcome, Progress, Seat, Stop, Verdict, WorkerInfo
from omniavatar.serve.batch.worker import Worker, enter_folder, error_outcome

RANK = "omniavatar.serve.batch.rank"
GRACE_S = 5.0
"""How long to wait for the cause after a rank reports that it lost another."""
EXIT_S = 2.0
"""How long a process may take to end after it closed its connection."""


class GroupWorker:
    """A `Worker` on several devices.

    factory: a pickled `GroupFactory`.
    destination: handed on to the worker.
    grace_s: seconds to wait for the cause of a failure after its first symptom.
    kind: class of the worker in rank 0.
    """

    def __init__(
        self,
        factory: bytes,
        seat: Seat,
        destination: Any,
        folder: str,
        grace_s: float = GRACE_S,
        kind: Callable[..., Any] = Worker,
    ) -> None:
        self._kind = kind
        self._factory, self._seat, self._destination, self._folder = factory, seat, destination, folder
        self._grace_s = grace_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._life_pipe: int | None = None  # the ranks end when its last writer closes it
        self._progress = Progress(None, 0, 0)

    def start(self) -> WorkerInfo | Outcome:
        began = time.time()
        try:
            enter_folder(self._folder)
            self._start_ranks()
            return self._answer(began)
        except Exception as error:
            self._end()
            return error_outcome(error, began)

    def run(self, task: Any) -> Outcome:
        began = time.time()
        self._progress = Progress(task.key, 0, 0)
        try:
            with suppress(OSError):  # rank 0 died; `_answer` finds out why
                self._connections[0].send(task)
            answer = self._answer(began)
            assert isinstance(answer, Outcome)
            return answer
        except Exception as error:
            self._end()
            return error_outcome(error, began)
        finally:
            self._progress = Progress(None, 0, 0)

    def progress(self) -> Progress:
        return self._progress

    def stop(self, how: Stop) -> None:
        """Tell the worker in rank 0; a dead one is noticed by `run`."""
        with suppress(OSError, IndexError):
            self._connections[0].send(how)

    def close(self) -> None:
        """End the ranks."""
        self._end()

    def _start_ranks(self) -> None:
        store, (pipe, self._life_pipe) = os.memfd_create("ranks"), os.pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        for _ in self._seat.devices:
            ours, theirs = Pipe()
            command = [sys.executable, "-m", RANK, str(theirs.fileno()), str(pipe)]
            self._processes.append(
                subprocess.Popen(
                    command,
                    pass_fds=(theirs.fileno(), pipe, store),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # only the driver handles Ctrl-C
                )
            )
            theirs.close()
            self._connections.append(ours)
        os.close(pipe)
        os.close(store)
        for rank, connection in enumerate(self._connections):
            member = Member(self._seat, rank, f"/proc/self/fd/{store}")
            with suppress(OSError):
                connection.send((member, self._factory, self._destination, self._folder, self._kind))

    def _answer(self, began: float) -> WorkerInfo | Outcome:
        """The answer of rank 0, or the error that ended the group."""
        for rank, message in self._messages(None):
            if isinstance(message, Progress):
                self._progress = message
                continue
            if isinstance(message, WorkerInfo):
                return message
            answer = message
            if rank or answer is None or answer.verdict is Verdict.lost:
                answer = self._cause(rank, answer, began)
            if answer.replace:
                self._end()
            return answer
        raise AssertionError("the messages ended without a time limit")

    def _messages(self, until: float | None) -> Iterator[tuple[int, WorkerInfo | Progress | Outcome | None]]:
        """Messages of the ranks in order; None if a rank closed its connection. Ends at the time `until`."""
        open_ranks = dict(zip(self._connections, range(len(self._connections)), strict=True))
        while open_ranks:
            remaining = None if until is None else until - time.monotonic()
            ready = wait(list(open_ranks), remaining) if remaining is None or remaining > 0 else []
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    yield open_ranks.pop(connection), None
                else:
                    yield open_ranks[connection], message

    def _cause(self, rank: int, first: Outcome | None, began: float) -> Outcome:
        """The error that ended the group.

        A death by signal and an error in a rank itself are causes. The loss of a peer, or an exit without an
        error, is reported only if no cause arrives within `GRACE_S`.

        first: the first message about the failure, from `rank`.
        """
        symptom: Outcome | None = None
        for each, message in chain([(rank, first)], self._messages(time.monotonic() + self._grace_s)):
            if isinstance(message, Progress | WorkerInfo):
                continue
            found = self._exit(each, began) if message is None else self._named(each, message)
            if found.verdict is not Verdict.lost or found.error_class == "Killed":
                return found
            symptom = symptom or found
        assert symptom is not None
        return symptom

    def _exit(self, rank: int, began: float) -> Outcome:
        """How the process of `rank` ended, after it closed its connection."""
        try:
            code = self._processes[rank].wait(EXIT_S)
        except subprocess.TimeoutExpired:
            code = 0
        killed = code < 0
        how = f"was killed by {signal_name(-code)}" if killed else f"ended with code {code}"
        hint = " (out of host memory?)" if code == -signal.SIGKILL else ""
        text = f"{self._name(rank)}: its process {how}{hint}; finished windows are kept"
        kind = "Killed" if killed else "Exited"
        return Outcome(Verdict.lost, began, time.time(), error=text, error_class=kind, replace=True)

    def _named(self, rank: int, outcome: Outcome) -> Outcome:
        """`outcome` with the rank's name in its error; after the last line if the error is a traceback."""
        if rank == 0:
            return outcome
        name, error = self._name(rank), outcome.error.strip()
        text = f"{error} on {name}" if outcome.verdict is Verdict.broken else f"{name}: {error}"
        return replace(outcome, error=text)

    def _name(self, rank: int) -> str:
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        on_gpu = self._seat.devices[rank] != "cpu" and rank < len(gpus)
        return f"rank {rank} (GPU {gpus[rank]})" if on_gpu else f"rank {rank}"

    def _end(self) -> None:
        """Kill the ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        if self._life_pipe is not None:
            os.close(self._life_pipe)
            self._life_pipe = None
        self._processes, self._connections = [], []
