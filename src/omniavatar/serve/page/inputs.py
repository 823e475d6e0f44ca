"""What a video would be warned of, before it is made, from a process that a hostile file may crash."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any, Protocol

from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.errors import ResourceError
from omniavatar.parallel.launch import signal_name
from omniavatar.serve.batch.items import InputWarning
from omniavatar.serve.jobs.process_crew import lower_priority
from omniavatar.types import AvatarRequest

PROCESS = "omniavatar.serve.page.input_process"
SECONDS = 180.0
"""A longer check is given up; the worker warns during the run."""
EXIT_S = 2.0


class InputWarnings(Protocol):
    """Compares the inputs of a request with what its model was trained for."""

    def __call__(self, config: PipelineConfig, request: AvatarRequest) -> list[InputWarning]:
        """Raises ResourceError if the check fails."""
        ...


class CheckedApart:
    """`InputWarnings` by one process on the CPU, started when it is needed; one question at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, config: PipelineConfig, request: AvatarRequest) -> list[InputWarning]:
        settings = {"device": "cpu", "vae_device": None, "threads": 1, "sp_size": 1, "cfg_parallel": 1}
        question = pickle.dumps((changed(config, runtime=settings), request))
        with self._lock:
            line = self._asked(question) or self._asked(question)  # the idle one ended just now
        if not line:
            raise ResourceError("the check of the files ended early; the run itself warns too")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ResourceError(answer["error"])
        return [InputWarning(about, text) for about, text in answer["warnings"]]

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _asked(self, question: bytes) -> bytes:
        """The line of an answer; empty if the process ended without one. Raises ResourceError."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            line = b""
        finally:
            timer.cancel()
        if not line:
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_S)
            code = self._end()
            if code < 0:
                raise ResourceError(
                    f"the check of the files was ended by {signal_name(-code)} (it took too long or too much "
                    "memory); the run itself warns too"
                )
        return line

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROCESS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                process_group=0,  # only the server handles signals of the terminal
            )
            lower_priority(self._process.pid)
        return self._process

    def _end(self) -> int:
        """Kill the process, if there is one; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        with suppress(OSError):  # what was not sent was for a process that has ended
            process.stdin.close()
        return process.wait()
