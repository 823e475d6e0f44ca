"""A fake engine for tests of the batch runner, with known duration, known bytes, and failures on demand.

Like a real engine, it appends windows to `<output>.job`, continues an interrupted job after its last complete
window, and renames the finished video. It logs its actions in `<notes>/log`. The first word of the prompt
selects a failure: `bad`, `oom`, `bug`, `weights`, `full` (while `<notes>/full` exists), `slow`; in a group
also `peer` (the leader loses a follower) and `uneven` (an error that leaves the other ranks blocked).
In a group, followers log their start and wait; `fail_follower` makes the next one fail.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from omniavatar.errors import CheckpointError, InputError, OutputError, ResourceError
from omniavatar.serve.batch.items import Engine, Item, Made, Member, PeerLost, Seat
from omniavatar.types import AvatarRequest

BYTES = 64


class FlakyFileSystem(LocalFileSystem):
    """`flaky://`: the local disk, which fails while the file `FLAKY_FAILURES` holds a number above 0."""

    protocol = "flaky"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def put_file(self, lpath, rpath, **kwargs):
        counter = Path(os.environ["FLAKY_FAILURES"])
        left = int(counter.read_text())
        if left:
            counter.write_text(str(left - 1))
            Path(rpath).write_bytes(Path(lpath).read_bytes()[:7])
            raise TimeoutError("the network went away")
        super().put_file(lpath, rpath, **kwargs)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@dataclass(frozen=True)
class StubEngines:
    """Makes engines that take `seconds` per window; `paced` ones also wait for `release_window`."""

    notes: Path
    windows: int = 4
    seconds: float = 0.01
    paced: bool = False

    def __call__(self, seat: Seat) -> Engine:
        if (self.notes / "no_engine").exists():
            raise CheckpointError("weights.pt: missing shard; fetch it again")
        return StubEngine(self)

    def lead(self, member: Member) -> Engine:
        assert len(member.seat.devices) > 1 and member.rank == 0
        return self(member.seat)

    def follow(self, member: Member) -> None:
        StubEngine(self, "follower")
        trouble = self.notes / "follower"
        while not trouble.exists():
            time.sleep(0.02)
        what = trouble.read_text()
        trouble.unlink()
        if what == "oom":
            raise ResourceError("max_tokens: 30000 needs more GPU memory than is free; lower max_tokens")
        if what == "exit":
            os._exit(3)
        assert what == "bug", what
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class StubEngine:
    def __init__(self, settings: StubEngines, role: str = "engine") -> None:
        self.settings = settings
        self.sound, self.released = True, 0
        self.note(role, "-")

    def device(self) -> str:
        return "stub"

    def intact(self) -> bool:
        return self.sound

    def note(self, what: str, name: str) -> None:
        line = f"{what} {name} {os.getpid()} {time.time()}\n"
        with (self.settings.notes / "log").open("a") as file:
            file.write(line)

    def run(
        self, request: AvatarRequest, output: Path, fresh: bool, on_window: Callable[[int, int], None]
    ) -> Made:
        notes, windows = self.settings.notes, self.settings.windows
        with (notes / f"{output.name}.alone").open("w") as alone:
            try:
                fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.note("collision", output.name)
                raise
            self.note("begin", output.name)
            trouble = request.prompt.split()[0]
            if trouble == "bad":
                raise InputError(f"image {request.image}: is broken; give another")
            if trouble == "weights":
                raise CheckpointError("weights.pt: missing shard; fetch it again")
            sidecar = output.with_suffix(".json")
            if not fresh and output.exists() and sidecar.exists():
                return Made(windows, windows, windows, float(windows))
            job = output.with_name(output.name + ".job")
            done = 0 if fresh or not job.exists() else job.stat().st_size // BYTES
            on_window(done, windows)
            for window in range(done, windows):
                time.sleep(self.settings.seconds)
                self.wait_for_release()
                if window == 1:
                    self.fail(trouble, notes)
                with job.open("r+b" if job.exists() else "wb") as file:
                    file.seek(window * BYTES)
                    file.write(window_bytes(request.prompt, window))
                self.note("window", output.name)
                on_window(window + 1, windows)
            os.replace(job, output)
            mark = {"fingerprint": {}, "versions": {"omniavatar": "0"}}
            sidecar.write_text(json.dumps({"bytes": output.stat().st_size, **mark}))
            self.note("end", output.name)
            return Made(windows, windows, done, float(windows))

    def wait_for_release(self) -> None:
        if not self.settings.paced:
            return
        self.released += 1
        while not (self.settings.notes / f"released{self.released}").exists():
            time.sleep(0.005)

    def fail(self, trouble: str, notes: Path) -> None:
        if trouble == "oom":
            raise ResourceError("max_tokens: 30000 needs more GPU memory than is free; lower max_tokens")
        if trouble == "full" and (notes / "full").exists():
            raise OutputError("cannot write x.mp4: the disk is full; free some space")
        if trouble == "bug":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if trouble == "peer":
            self.note("complaint", "-")
            raise PeerLost("lost contact with another process (connection closed by peer)")
        if trouble == "uneven":
            self.sound = False
            raise OutputError("cannot write x.mp4: the disk is full; free some space")
        if trouble == "slow":
            time.sleep(1.5)


def window_bytes(prompt: str, window: int) -> bytes:
    return hashlib.sha512(f"{prompt}{window}".encode()).digest()


def video_bytes(prompt: str, windows: int = 4) -> bytes:
    """The bytes of a video made without interruption."""
    return b"".join(window_bytes(prompt, window) for window in range(windows))


def fail_follower(notes: Path, trouble: str) -> None:
    """Have the follower of the group fail. The file appears whole: the follower looks for it all the time."""
    (notes / "follower.new").write_text(trouble)
    os.replace(notes / "follower.new", notes / "follower")


def release_window(notes: Path, number: int) -> None:
    """Let an engine that is `paced` make its window `number`, counted from 1 over all its videos."""
    (notes / f"released{number}").touch()


def make_items(prompts: list[str]) -> list[Item]:
    return [
        Item(f"{i:05d}", f"{i:05d}.mp4", i + 1, prompt, prompt, AvatarRequest(prompt, "face.png"))
        for i, prompt in enumerate(prompts)
    ]


def noted(notes: Path, what: str) -> list[str]:
    """Names of the videos with a log entry `what`, in order."""
    path = notes / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1] for line in lines if line.split()[0] == what]
