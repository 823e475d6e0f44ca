"""Kills `omniavatar generate` at random moments until its videos are finished, and compares their bytes.

    PYTHONPATH=tests python -m fuzz.kills [--kills 200] [--seed 0] [--disk FOLDER]

Each video of the nano model is made in a child process. The child gets SIGKILL, SIGTERM or SIGINT after a
random time, or its disk is full for a while (`--disk`: a small file system of its own, see `small_disk` in
tests/conftest.py). The same command is given again until it ends with 0. Then the video must have the bytes
of an uninterrupted run, its sidecar must name its frames, and nothing else may be left.
The children are forked from a server that has imported the package, so that a kill costs no start.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz.targets import REPOSITORY

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WINDOWS_HP = "num_steps=1,image_sizes_720=[[32,32]],max_tokens=20,overlap_frame=1,guidance_scale=1,device=cpu"
FRAMES = 120
MOST_TRIES = 60
"""Starts of one video; far more than its windows."""


def arguments(weights: Path, output: Path, number: int) -> list[str]:
    """The command of video `number`; every second one has sound."""
    assets = REPOSITORY / "src" / "omniavatar" / "assets"
    hp = f"{WINDOWS_HP},seed={number},text_cache_dir={weights.parent / 'cache'},threads=1"
    sound = ["--audio", str(assets / "speech.flac")] if number % 2 else [f"--hp=seq_len={FRAMES}"]
    return [
        "generate", "--config", str(weights.parent / "nano.yaml"), "--prompt", f"person {number}",
        "--image", str(assets / "portrait.png"), "--output", str(output), "--quiet", f"--hp={hp}", *sound,
    ]  # fmt: skip


def child(command: list[str], log: str) -> None:
    """Run the command line in this process, with its output in `log`."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from omniavatar.cli import main

    main(command)


class Victim:
    """Starts the command again and again."""

    def __init__(self, weights: Path, folder: Path) -> None:
        self.weights, self.folder = weights, folder
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["omniavatar.cli", "omniavatar.engine.pipeline", "transformers"])
        self.log = folder / "log"

    def start(self, output: Path, number: int) -> Any:
        command = arguments(self.weights, output, number)
        process = self.context.Process(target=child, args=(command, str(self.log)))
        process.start()
        return process

    def make(self, output: Path, number: int) -> float:
        """An uninterrupted run; returns its seconds."""
        began = time.monotonic()
        process = self.start(output, number)
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"an uninterrupted run ended with {process.exitcode}:\n{self.log.read_text()}")
        return time.monotonic() - began


def prepare(folder: Path) -> Path:
    """The nano checkpoint and its config in `folder`; returns the folder of the weights."""
    from omniavatar.checkpoint.synthetic import make_checkpoint

    weights = folder / "nano"
    make_checkpoint("nano", weights)
    text = (REPOSITORY / "configs" / "nano.yaml").read_text()
    (folder / "nano.yaml").write_text(text.replace("pretrained_models/nano", str(weights)))
    return weights


def wrong(output: Path, whole: Path) -> str | None:
    """What is wrong with a finished video; None if nothing is."""
    if output.read_bytes() != whole.read_bytes():
        return "other bytes than an uninterrupted run"
    sidecar, other = (json.loads(each.with_suffix(".json").read_text()) for each in (output, whole))
    if (sidecar["frames"], sidecar["bytes"]) != (other["frames"], other["bytes"]):
        return "the sidecar has other frames or bytes"
    left = sorted(
        path.name for path in output.parent.iterdir() if path not in (output, output.with_suffix(".json"))
    )
    return f"left behind: {', '.join(left)}" if left else None


def attack(
    victim: Victim, dice: random.Random, output: Path, number: int, seconds: float, disk: bool
) -> Counter[str]:
    """Kill video `number` until it is finished; returns how often by what."""
    count: Counter[str] = Counter()
    for _ in range(MOST_TRIES):
        filler = output.parent.parent / "filler"
        if disk and dice.random() < 0.3:
            free = os.statvfs(output.parent)
            filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - dice.randrange(60_000))))
            count["full disk"] += 1
        process = victim.start(output, number)
        process.join(dice.uniform(0.02, 1.1) * seconds)
        if process.is_alive():
            sent = dice.choice(SIGNALS)
            os.kill(process.pid, sent)
            process.join(60)
            if process.is_alive():
                raise SystemExit(
                    f"video {number} did not end after {sent.name}:\n{victim.log.read_text()[-2000:]}"
                )
            count[sent.name] += 1
        filler.unlink(missing_ok=True)
        if process.exitcode == 0:
            return count
    raise SystemExit(
        f"video {number} was not finished in {MOST_TRIES} starts:\n{victim.log.read_text()[-2000:]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help="folder on a small file system, which is filled at times")
    options = parser.parse_args()
    dice, count, faults, number = random.Random(options.seed), Counter(), [], 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        victim = Victim(prepare(folder), folder)
        while sum(count.values()) < options.kills:
            made = (options.disk or folder) / f"video{number}"
            for each in (made, folder / "whole"):
                each.mkdir(exist_ok=True)
            whole = folder / "whole" / f"{number}.mp4"
            seconds = victim.make(whole, number)
            output = made / f"{number}.mp4"
            count += attack(victim, dice, output, number, seconds, options.disk is not None)
            if problem := wrong(output, whole):
                faults.append(f"video {number}: {problem}")
            for path in made.iterdir():
                path.unlink()
            number += 1
            print(f"\r{number} videos, {sum(count.values())} kills", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("\n".join(faults) or f"{number} videos equal those of uninterrupted runs")
    print(f"{sum(count.values())} kills: {dict(count)}; seed {options.seed}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
