"""Tries a target of the Dockerfile without Docker: its commands in a clean folder, its server, its health.

`python deploy/try_image.py [cpu|cuda] [--keep FOLDER]` follows the stages of the target. Paths of the image
become paths under the folder. Commands that need root (users, apt) are named and left out. The server is
then started with the image's environment; it must become healthy, make a video, and end by SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
ROOTS = ("/opt/omniavatar", "/src", "/app", "/data")
"""Paths of the image that become paths in the folder."""
AS_ROOT = ("groupadd", "apt-get")
READY_S, VIDEO_S = 120.0, 300.0


@dataclass
class Stage:
    """A stage of a Dockerfile. steps: instruction and text, in order. base: another stage, or an image."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, line ends joined, comments left out."""
    found: dict[str, Stage] = {}
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    current: Stage | None = None
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name.strip()] = Stage(name.strip(), base.strip())
        elif word and current is not None:
            current.steps.append((word, " ".join(rest.split())))
    return found


def steps_of(found: dict[str, Stage], name: str) -> Iterator[tuple[str, str]]:
    """The steps of a stage and of the stages that it builds on."""
    stage = found[name]
    if stage.base in found:
        yield from steps_of(found, stage.base)
    yield from stage.steps


def environment_of(steps: Iterator[tuple[str, str]]) -> dict[str, str]:
    """What the ENV instructions set; `$PATH` stays as it is written."""
    values: dict[str, str] = {}
    for word, text in steps:
        if word == "ENV":
            values |= dict(part.split("=", 1) for part in shlex.split(text))
    return values


def last_of(steps: Iterator[tuple[str, str]], word: str) -> str:
    """The text of the last instruction of this kind."""
    return [text for each, text in steps if each == word][-1]


class Image:
    """A target in a folder."""

    def __init__(self, folder: Path, target: str) -> None:
        self.folder, self.target = folder, target
        self.stages = stages(DOCKERFILE.read_text())
        self._place = Path("/")

    def path(self, text: str) -> str:
        """A text with the paths of the image replaced."""
        for root in ROOTS:
            text = re.sub(rf"(?<![\w/.]){re.escape(root)}(?![\w-])", f"{self.folder}{root}", text)
        return text

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "LANG", "LC_"))}
        values = environment_of(steps_of(self.stages, self.target))
        values["PATH"] = self.path(values["PATH"]).replace("$PATH", os.environ["PATH"])
        return {**kept, **{name: self.path(value) for name, value in values.items()}}

    def build(self) -> None:
        """Carry out the steps of all stages that the target needs."""
        for root in ROOTS:
            Path(f"{self.folder}{root}").mkdir(parents=True, exist_ok=True)
        copied = re.findall(r"--from=(\S+)", " ".join(text for _, text in self.stages[self.target].steps))
        for name in [*copied, self.target]:
            self._place = Path("/")
            for word, text in steps_of(self.stages, name):
                self._step(word, text)

    def _step(self, word: str, text: str) -> None:
        if word == "WORKDIR":
            self._place = Path(f"{self.folder}{text}")
            self._place.mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            for source in sources:
                self._copy(REPOSITORY / source, self._place / target)
        elif word == "RUN":
            self._run(text)

    def _copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def _run(self, text: str) -> None:
        if text.startswith(AS_ROOT):
            print(f"not tried (needs root): {text}", flush=True)
            return
        print(f"RUN {text}", flush=True)
        began = time.monotonic()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**self.environment(), "PATH": path, "HOME": str(self.folder)}
        subprocess.run(["sh", "-ec", self.path(text)], cwd=self._place, env=environment, check=True)
        print(f"    {time.monotonic() - began:.0f} s", flush=True)

    def serve(self) -> None:
        """Start the image's command, wait for its health check, make a video, end it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = self.environment()
        # no container keeps strangers away here; and the weights of the packaged model only
        environment |= {"OMNIAVATAR_SERVE_HOST": "127.0.0.1", "OMNIAVATAR_SERVE_PORT": str(port)}
        environment |= {"OMNIAVATAR_SERVE_GPUS": "cpu", "OMP_NUM_THREADS": "1"}
        entry = json.loads(last_of(steps_of(self.stages, self.target), "ENTRYPOINT"))
        command = json.loads(last_of(steps_of(self.stages, self.target), "CMD"))
        program = shutil.which(entry[0], path=environment["PATH"])
        assert program is not None and program.startswith(str(self.folder)), program
        server = subprocess.Popen([program, *entry[1:], *command], cwd=f"{self.folder}/app", env=environment)
        try:
            self._wait_healthy(environment, server)
            make_video(f"http://127.0.0.1:{port}", self.folder)
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        assert code == 0, f"the server ended with {code}"

    def health_command(self) -> list[str]:
        """The command of HEALTHCHECK."""
        text = last_of(steps_of(self.stages, self.target), "HEALTHCHECK")
        return [str(part) for part in json.loads(text.partition("CMD ")[2])]

    def _wait_healthy(self, environment: dict[str, str], server: subprocess.Popen[bytes]) -> None:
        ends = time.monotonic() + READY_S
        while subprocess.run(self.health_command(), env=environment, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < ends, "the server does not become healthy"
            time.sleep(1.0)
        print("healthy", flush=True)


def make_video(address: str, folder: Path) -> None:
    """One job with the packaged portrait and voice, from the request to its file."""
    assets = REPOSITORY / "src" / "omniavatar" / "assets"
    curl = ["curl", "--silent", "--show-error", "--fail"]
    made = subprocess.run(
        [
            *curl,
            f"{address}/v1/videos",
            *("-F", "prompt=a person talks", "-F", "model=pocket"),
            *("-F", f"input_reference=@{assets / 'pocket' / 'portrait.png'}"),
            *("-F", "num_inference_steps=1"),
        ],
        capture_output=True,
        check=True,
    )
    id = json.loads(made.stdout)["id"]
    ends = time.monotonic() + VIDEO_S
    while True:
        with urllib.request.urlopen(f"{address}/v1/videos/{id}") as reply:
            job = json.load(reply)
        if job["status"] in ("completed", "failed"):
            break
        assert time.monotonic() < ends, job
        time.sleep(1.0)
    assert job["status"] == "completed", job
    target = folder / "video.mp4"
    subprocess.run([*curl, "-o", str(target), f"{address}/v1/videos/{id}/content"], check=True)
    print(f"a video of {target.stat().st_size} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", nargs="?", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="omniavatar-image-"))
    try:
        image = Image(folder.absolute(), arguments.target)
        image.build()
        image.serve()
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)
    print(f"{arguments.target}: everything that needs no Docker works")


if __name__ == "__main__":
    main()
