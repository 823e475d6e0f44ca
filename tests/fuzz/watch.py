"""Runs inputs in processes that may hang, crash, or fill the memory, and records those that do.

A process announces each input before it reads it. The watcher kills a process that works too long on one
input or holds more than `BYTES`, records the input, and starts the next process after it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from fuzz.mutate import mutated
from fuzz.targets import make_targets

SECONDS = 10.0
"""Of one input: CPU time, or wall time while its process sleeps."""
LOADED = 6
"""Wall time may be this many times as long, where other work takes the cores."""
BYTES = 2 * 2**30
INPUTS_A_PROCESS = 2_000
"""A process ends after so many inputs, so that a leak of a library is not taken for a fault of an input."""


@dataclass
class Fault:
    """An input that did not end in a result or a documented error."""

    kind: str
    number: int
    problem: str


@dataclass
class Outcome:
    """Counts by target, and the faults."""

    inputs: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    slowest: float = 0.0
    most_bytes: int = 0


def input_of(targets: dict[str, Any], kinds: Sequence[str], seed: int, number: int) -> tuple[str, str, bytes]:
    """Kind, ending and content of input `number`; a function of the seed and the number alone."""
    dice = random.Random(f"{seed}/{number}")
    target = targets[kinds[number % len(kinds)]]
    if target.name == "trap":
        return target.name, ".x", str(number).encode()
    return target.name, dice.choice(target.endings), mutated(dice, target.good, target.text)


def run_input(target: Any, folder: Path, ending: str, content: bytes) -> str | None:
    """None if the target read the file or refused it; else the traceback."""
    from omniavatar.errors import OmniAvatarError

    path = folder / f"input{ending}"
    path.write_bytes(content)
    try:
        target.read(path)
        return None
    except OmniAvatarError as error:
        line = str(error)
        return None if line.strip() and "\n" not in line else f"an empty message, or several lines: {line!r}"
    except BaseException:
        return traceback.format_exc(limit=-6)


def work(pipe: Connection, kinds: Sequence[str], seed: int, first: int, step: int) -> None:
    """Child process: run every `step`-th input from `first`, and report each."""
    import logging

    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in C print what they find
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        targets = make_targets(folder)
        number = first
        for _ in range(INPUTS_A_PROCESS):
            kind, ending, content = input_of(targets, kinds, seed, number)
            pipe.send(("begin", number, kind))
            began = time.process_time()
            problem = run_input(targets[kind], folder, ending, content)
            pipe.send(("end", number, problem, time.process_time() - began))
            number += step
    pipe.send(("over", number, None))


class _Worker:
    """A child process, and what it is doing."""

    def __init__(self, context: Any, kinds: Sequence[str], seed: int, first: int, step: int) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, kinds, seed, first, step), daemon=True)
        self.process.start()
        theirs.close()
        self.next, self.kind, self.step = first, "start", step
        self.since: float | None = None
        self.cpu = 0.0
        self.ended = False

    def seconds(self) -> float:
        """Wall time of the input in hand."""
        return 0.0 if self.since is None else time.monotonic() - self.since

    def hangs(self, most_s: float) -> bool:
        """Whether the input in hand takes longer than `most_s` allows."""
        wall = self.seconds()
        if wall <= most_s:
            return False
        with contextlib.suppress(psutil.Error):
            asleep = psutil.Process(self.process.pid).status() == psutil.STATUS_SLEEPING
            return asleep or self.cpu_seconds() - self.cpu > most_s or wall > LOADED * most_s
        return False

    def cpu_seconds(self) -> float:
        with contextlib.suppress(psutil.Error):
            return sum(psutil.Process(self.process.pid).cpu_times()[:2])
        return 0.0

    def bytes(self) -> int:
        with contextlib.suppress(psutil.Error):
            return int(psutil.Process(self.process.pid).memory_info().rss)
        return 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def fuzz(
    kinds: Sequence[str],
    seed: int,
    workers: int,
    seconds: float | None = None,
    inputs: int | None = None,
    most_s: float = SECONDS,
) -> Iterator[Outcome]:
    """Run until `seconds` are over or `inputs` are done; yields the growing outcome about once a second.

    most_s: see SECONDS.

    Raises RuntimeError if a process does not start.
    """
    context = multiprocessing.get_context("spawn")
    outcome, ends = Outcome(), time.monotonic() + (seconds or 1e9)
    active = {lane: _Worker(context, kinds, seed, lane, workers) for lane in range(workers)}
    told = time.monotonic()
    try:
        while active and time.monotonic() < ends:
            wait([worker.pipe for worker in active.values()], 0.05)
            for lane, worker in list(active.items()):
                problem = _step(worker, outcome, most_s)
                if problem is not None:
                    outcome.faults.append(Fault(worker.kind, worker.next, problem))
                if problem is not None or worker.ended:
                    worker.kill()
                    after = worker.next + (worker.step if problem is not None else 0)
                    active[lane] = _Worker(context, kinds, seed, after, workers)
                if inputs is not None and worker.next >= inputs and worker.since is None:
                    active.pop(lane).kill()
            if time.monotonic() - told > 1:
                told = time.monotonic()
                yield outcome
    finally:
        for worker in active.values():
            worker.kill()
    yield outcome


def _step(worker: _Worker, outcome: Outcome, most_s: float) -> str | None:
    """Take some of what the worker reports; returns what is wrong with the input in hand."""
    try:
        for _ in range(200):
            if not worker.pipe.poll():
                break
            event, number, detail, *times = worker.pipe.recv()
            if event == "begin":
                worker.next, worker.kind, worker.since = number, detail, time.monotonic()
                worker.cpu = worker.cpu_seconds()
            elif event == "end":
                worker.since = None
                worker.next = number + worker.step
                outcome.inputs[worker.kind] = outcome.inputs.get(worker.kind, 0) + 1
                outcome.slowest = max(outcome.slowest, times[0])
                outcome.most_bytes = max(outcome.most_bytes, worker.bytes())
                if detail is not None:
                    outcome.faults.append(Fault(worker.kind, number, detail))
            else:
                worker.next = number
    except EOFError:
        worker.process.join()
        if worker.kind == "start":
            raise RuntimeError(f"a process of the fuzzer did not start ({worker.process.exitcode})") from None
        worker.ended = True
        if worker.since is not None or worker.process.exitcode:
            return f"the process ended with {worker.process.exitcode}"
        return None
    if worker.bytes() > BYTES:
        return f"more than {BYTES / 2**30:.0f} GiB"
    if worker.hangs(most_s):
        return f"no end after {most_s:.0f} s"
    return None
