"""A fake engine for tests of the queue's workers, with known bytes and failures on demand.

It appends windows to a file in the job's `work/` folder and goes on after the last whole one. Each window
waits while `<notes>/hold` names it or an earlier one. It logs what it does in `<notes>/log`. The first word
of the prompt selects a failure: `bad`, `bug`, `full`, `die` (the process ends in window 1, each time); `odd`
warns of the sound.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omniavatar.engine.events import Message, RequestStarted, StepFinished, WindowFinished, WindowStarted
from omniavatar.errors import BusyError, InputError, OutputError, StoppedError
from omniavatar.serve.batch.items import Made, Member, Seat
from omniavatar.serve.jobs.logs import log_as_json
from omniavatar.types import AvatarRequest, Event

BYTES = 64
ODD = "audio: it is silent; check that it is the right file"
STEPS = 4


@dataclass(frozen=True)
class StubJobEngines:
    """Makes engines; `video` is the finished video of every job."""

    notes: Path
    video: Path
    windows: int = 4
    seconds: float = 0.02
    log_level: str | None = None

    def __call__(self, seat: Seat) -> StubJobEngine:
        if self.log_level is not None:
            log_as_json(self.log_level)
        if (self.notes / "no_engine").exists():
            raise InputError("weights.pt: missing shard; fetch it again")
        return StubJobEngine(self)

    @property
    def configs(self) -> dict[str, str]:
        return {"pocket": "", "other": ""}

    def only(self, model: str) -> StubJobEngines:
        note(self.notes, f"group {model}")
        return self

    def lead(self, member: Member) -> StubJobEngine:
        return StubJobEngine(self)

    def follow(self, member: Member) -> None:
        while True:
            time.sleep(1)


class StubJobEngine:
    def __init__(self, settings: StubJobEngines) -> None:
        self.settings = settings

    def device(self) -> str:
        return "stub"

    def intact(self) -> bool:
        return True

    def run(
        self,
        model: str,
        request: AvatarRequest,
        output: Path,
        on_event: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> Made:
        settings, job = self.settings, output.with_name("video.mp4.job")
        id = output.parents[1].name
        job.mkdir(exist_ok=True)
        with (settings.notes / f"{id}.alone").open("w") as alone:
            try:
                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                note(settings.notes, f"collision {id}")
                raise BusyError(f"{output}: another process makes it") from None
            trouble = request.prompt.split()[0]
            if trouble == "bad":
                raise InputError("image: is broken; give another")
            if trouble == "bug":
                raise RuntimeError("a secret in a trace")
            if trouble == "full":
                raise OutputError("cannot write x.mp4: the disk is full; free some space")
            if trouble == "odd":
                on_event(Message("/secret/key.pem: others may read it", "warning"))
                on_event(Message(ODD, "warning", "audio"))
            done = len(list(job.glob("segment_*")))
            note(settings.notes, f"begin {id} {done} {os.getpid()}")
            on_event(RequestStarted(0, output.name, settings.windows * 9, settings.windows, STEPS, done))
            for window in range(done, settings.windows):
                on_event(WindowStarted(window, settings.windows))
                for step in range(STEPS):
                    if should_stop():
                        raise StoppedError(f"the run was stopped before step {step + 1}")
                    while not step and holds(settings.notes, window) and not should_stop():
                        time.sleep(0.005)
                    time.sleep(settings.seconds / STEPS)
                    on_event(StepFinished(window, step, STEPS, "compute", 1))
                if trouble == "die" and window == 1:
                    os._exit(9)
                (job / f"segment_{window:05d}.mp4").write_bytes(bytes([window]) * BYTES)
                (job / "job.json").write_text(json.dumps({"done": window + 1}))
                note(settings.notes, f"window {id} {window} {model}")
                on_event(WindowFinished(window, settings.windows, 9 * (window + 1), 0.1))
            output.write_bytes(settings.video.read_bytes())
            values = {"windows": settings.windows, "frames": 36, "resumed_windows": done}
            values |= {"plan": {"duration_s": 1.44}, "bytes": output.stat().st_size}
            values |= {"fingerprint": {}, "versions": {"omniavatar": "0"}}
            output.with_suffix(".json").write_text(json.dumps(values))
            note(settings.notes, f"end {id}")
            return Made(36, settings.windows, done, 1.44)


def holds(notes: Path, window: int) -> bool:
    """Whether `window` must wait."""
    try:
        return window >= int((notes / "hold").read_text())
    except FileNotFoundError:
        return False


def note(folder: Path, text: str) -> None:
    with (folder / "log").open("a") as file:
        file.write(f"{text}\n")


def noted(folder: Path, what: str) -> list[list[str]]:
    """The words after `what` of each such line of the log."""
    path = folder / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1:] for line in lines if line.split()[0] == what]
