"""A queue in a folder for tests of its workers: database, files, and the fake engine's notes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import job_driver
from job_driver import RULES
from job_stub import StubJobEngines, noted
from media_files import segments
from omniavatar.serve.jobs.files import JobFiles
from omniavatar.serve.jobs.process_crew import ProcessCrew
from omniavatar.serve.jobs.records import VIDEO, JobRecord, JobSpec, JobStatus, new_job_id
from omniavatar.serve.jobs.store import JobStore
from omniavatar.serve.jobs.workers import WorkerRules, Workers
from processes import start as start_process

WAIT_S = 60.0


class Place:
    """A queue in a folder: database, files, the fake engine's notes."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.notes, self.url = folder / "notes", url or f"sqlite:///{folder}/jobs.db"
        self.notes.mkdir()
        self.video = segments(folder, [9])[0]
        self.files = JobFiles(str(folder / "files"))
        self.store = JobStore.open(self.url)
        self.engines = StubJobEngines(self.notes, self.video)

    def submit(self, prompt: str = "a person speaks", **changes: Any) -> str:
        id = new_job_id()
        self.files.put(id, "input/portrait.png", io.BytesIO(b"picture"))
        self.files.put(id, "input/voice.wav", io.BytesIO(b"sound"))
        values = {"model": "pocket", **changes}
        spec = JobSpec(prompt=prompt, image="input/portrait.png", audio="input/voice.wav", **values)
        return self.store.submit("key", spec, id=id)[0].id

    def hold(self, window: int = 0) -> None:
        """Let every job wait in this window, until `go`."""
        (self.notes / "hold.new").write_text(str(window))
        os.replace(self.notes / "hold.new", self.notes / "hold")

    def go(self) -> None:
        (self.notes / "hold").unlink()

    @contextmanager
    def workers(self, count: int = 1, **rules: Any) -> Iterator[tuple[Workers, ProcessCrew]]:
        """Workers in a thread of this process."""
        crew = ProcessCrew(count, self.engines, self.files)
        ended: list[str] = []
        made = Workers(
            self.store,
            self.files,
            lambda: crew,
            ["pocket", "other"],
            WorkerRules(**{**RULES, **rules}),
            ended.append,
        )
        self.ended = ended
        made.start()
        try:
            yield made, crew
        finally:
            made.stop()
            assert made.join(WAIT_S)

    @contextmanager
    def driver(self, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """Workers in a process, as on another machine."""
        values = {"url": self.url, "files": self.files.place, **options}
        values["engines"] = {"notes": str(self.notes), "video": str(self.video)}
        command = [sys.executable, job_driver.__file__, json.dumps(values)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = start_process(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def until(self, id: str, true: Callable[[JobRecord], bool]) -> JobRecord:
        end = time.monotonic() + WAIT_S
        while not true(job := self.store.get(id)):
            assert time.monotonic() < end, job
            time.sleep(0.02)
        return job

    def finished(self, id: str) -> JobRecord:
        job = self.until(id, lambda job: job.status in (JobStatus.completed, JobStatus.failed))
        assert job.status is JobStatus.completed, job
        return job

    def made_once(self, id: str) -> None:
        """Every window was made once, by one worker at a time."""
        assert noted(self.notes, "collision") == []
        windows = [words[1] for words in noted(self.notes, "window") if words[0] == id]
        assert windows == ["0", "1", "2", "3"], windows
        assert self.files.local(id, VIDEO).read_bytes() == self.video.read_bytes()
