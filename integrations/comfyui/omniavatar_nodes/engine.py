"""The engine's process, seen from ComfyUI: started at first use, again after it ended, ended with ComfyUI."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
PYTHON = "OMNIAVATAR_PYTHON"
"""Environment variable with the Python that runs the engine."""
POLL_S = 0.1
STOP_S = 60.0
"""Time that a stopped run gets to end its step; then the process is killed. Finished windows are kept."""
CLOSE_S = 40.0
LOG_LINES = 5
LAST = ("done", "stopped", "error", "bug")
"""Kinds of the last reply to an order."""

OnReply = Callable[[Mapping[str, Any]], None]


class EngineError(RuntimeError):
    """What ComfyUI shows of a failed order: one line with the remedy."""


def choose_python(given: str) -> str:
    """The Python of the engine: the one given, the one of the environment variable, or ComfyUI's own.

    Raises EngineError if it is no program.
    """
    for value, origin in ((given.strip(), "python"), (os.environ.get(PYTHON, "").strip(), PYTHON)):
        if value:
            path = Path(value).expanduser()
            if not (path.is_file() and os.access(path, os.X_OK)):
                raise EngineError(f"{origin}: {path} is no program; give the python of an environment")
            return str(path.absolute())
    return sys.executable


class Engine:
    """One process for one Python. `order` is safe to call from any thread; orders wait for each other."""

    def __init__(self, python: str, log: Path) -> None:
        self.python, self._log = python, log
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    @property
    def pid(self) -> int | None:
        """Of the running process; None if it does not run."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def order(self, order: Mapping[str, Any], on_reply: OnReply, poll: Callable[[], None]) -> dict[str, Any]:
        """Carry out an order; returns its result.

        - on_reply: called for every reply before the last one.
        - poll: called several times a second.

        If one of them raises, the run is stopped and the exception leaves this call. Raises EngineError.
        """
        with self._lock:
            self._start()
            number = next(self._numbers)
            self._send({**order, "number": number})
            try:
                reply = self._last(number, on_reply, poll)
            except EngineError:
                raise
            except BaseException:
                self._stop(number)
                raise
        if reply["kind"] == "done":
            return reply["value"]
        if reply["kind"] == "bug":
            self._wait()
            raise EngineError(
                f"omniavatar failed: {reply['text']}; this is a bug, {self._log} has the details"
            )
        raise EngineError(reply["text"])

    def close(self) -> None:
        """End the process; a run in hand is stopped, and its finished windows are kept."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            try:
                if process.stdin is not None:
                    process.stdin.close()
                process.wait(CLOSE_S)
            except (OSError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()

    def _start(self) -> None:
        if self.pid is not None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
        try:
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    [self.python, "-u", "-P", str(WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                    env=environment,
                )
        except OSError as error:
            raise EngineError(f"python: {self.python} cannot be started ({error.strerror})") from None
        self._process, self._replies = process, queue.Queue()
        threading.Thread(target=_read, args=(process, self._replies), daemon=True).start()
        first = self._replies.get()
        if first is None:
            raise self._ended()
        if first["kind"] != "ready":
            self._wait()
            raise EngineError(first["text"])

    def _last(self, number: int, on_reply: OnReply, poll: Callable[[], None]) -> dict[str, Any]:
        while True:
            poll()
            try:
                reply = self._replies.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if reply is None:
                raise self._ended()
            if reply["number"] != number:
                continue
            if reply["kind"] in LAST:
                return reply
            on_reply(reply)

    def _stop(self, number: int) -> None:
        """Stop the run in hand and wait for its end; kill the process if it does not come."""
        try:
            self._send({"do": "stop", "number": number})
            waited = 0.0
            while waited < STOP_S:
                try:
                    reply = self._replies.get(timeout=POLL_S)
                except queue.Empty:
                    waited += POLL_S
                    continue
                if reply is None or (reply["number"] == number and reply["kind"] in LAST):
                    return
        except EngineError:
            return  # it has ended, which is what a stop is for
        if self._process is not None:
            self._process.kill()
            self._wait()

    def _send(self, order: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def _wait(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        if process.stdin is not None:
            with suppress(OSError):  # what was not sent was for a process that has ended
                process.stdin.close()
        return process.wait()

    def _ended(self) -> EngineError:
        """The error of a process that has ended by itself."""
        code = self._wait()
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name
            how += " (often too little memory)" if how == "SIGKILL" else ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        tail = " | ".join(line.strip() for line in lines[-LOG_LINES:])
        return EngineError(
            f"omniavatar's process ended with {how}; queue it again: a new process starts, and finished "
            f"windows are kept. Its last lines ({self._log}): {tail or 'none'}"
        )


def _read(process: subprocess.Popen[str], replies: queue.Queue[dict[str, Any] | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(json.loads(line))
    replies.put(None)


class Engines:
    """The one engine that runs: models of two processes would not fit on a card."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def of(self, python: str, log: Path) -> Engine:
        """The engine of this Python; another one is closed first."""
        with self._lock:
            if self._engine is not None and self._engine.python == python:
                return self._engine
            if self._engine is None:
                atexit.register(self.close)
            else:
                self._engine.close()
            self._engine = Engine(python, log)
            return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
