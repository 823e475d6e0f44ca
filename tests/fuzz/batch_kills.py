"""Kills processes of `omniavatar batch` at random moments, and compares the bytes of its videos.

    PYTHONPATH=tests python -m fuzz.batch_kills [--kills 50] [--seed 0]

A batch of the nano model runs on two workers of a Ray of its own. Its driver, a worker, or a process of Ray
gets SIGKILL, SIGTERM or SIGINT after a random time. A driver that ended early is started again with the same
command. When it ends with 0, each video must have the bytes that `omniavatar generate` makes of the request
without an interruption, and no process may be left.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from fuzz.kills import Victim, arguments, prepare, wrong

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
VIDEOS = 6
MOST_STARTS = 200
END_S = 120.0
"""Ray's processes end within this time after their driver; its agents ask a dead GCS for a while."""


class Batch:
    """One batch, which is started again and again.

    first: an odd number, because only those videos have sound.
    """

    def __init__(self, weights: Path, folder: Path, first: int) -> None:
        self.numbers = range(first, first + 2 * VIDEOS, 2)
        self.output, self.log = folder / "videos", folder / "batch.log"
        shared = arguments(weights, folder / "unused.mp4", first)
        config = shared[shared.index("--config") + 1]
        lines = folder / "in.jsonl"
        lines.write_text("".join(json.dumps(self._line(weights, number)) + "\n" for number in self.numbers))
        hp = next(word for word in shared if word.startswith("--hp=num_steps"))
        hp = ",".join(part for part in hp.split(",") if not part.startswith("seed="))
        self.command = [sys.executable, "-m", "omniavatar.cli", "batch", "--config", config, hp]
        self.command += ["--input_file", str(lines), "--gpus", "cpu", "--workers", "2", "--quiet"]
        self.command += ["--output", str(self.output), "--run-dir", str(folder / "run")]

    @staticmethod
    def _line(weights: Path, number: int) -> dict[str, object]:
        words = arguments(weights, Path("unused.mp4"), number)
        line = {name: words[words.index(f"--{name}") + 1] for name in ("prompt", "image", "audio")}
        return {**line, "seed": number, "output": f"{number}.mp4"}

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)


def attack(batch: Batch, dice: random.Random, seconds: float, most: int) -> Counter[str]:
    """Kill processes of the batch until it is finished, at most `most` times; returns how often which."""
    count: Counter[str] = Counter()
    for _ in range(MOST_STARTS):
        driver = batch.start()
        begun = {process.pid: process for process in (psutil.Process(driver.pid),)}
        killed = sum(count.values())
        while driver.poll() is None:
            wait = dice.uniform(0.02, 0.25) * seconds if sum(count.values()) < most else END_S
            try:
                driver.wait(wait)
            except subprocess.TimeoutExpired:
                begun |= {process.pid: process for process in tree(driver.pid)}
                if sum(count.values()) < most:
                    count[kill_one(driver.pid, dice)] += 1
        _, alive = psutil.wait_procs(list(begun.values()), END_S)
        if alive:
            raise SystemExit(f"left running: {', '.join(map(name_of, alive))}\n{end_of(batch.log)}")
        if driver.returncode == 0:
            return count
        if killed == sum(count.values()):
            raise SystemExit(f"an undisturbed batch ended with {driver.returncode}:\n{end_of(batch.log)}")
    raise SystemExit(f"the batch was not finished in {MOST_STARTS} starts:\n{end_of(batch.log)}")


def kill_one(driver: int, dice: random.Random) -> str:
    """Send a signal to the driver, a worker or a process of Ray; returns which got what."""
    kinds: dict[str, list[psutil.Process]] = {"driver": [psutil.Process(driver)]}
    for process in tree(driver):
        name = name_of(process)
        kinds.setdefault("worker" if name.startswith("ray::") else "Ray", []).append(process)
    kind = dice.choice(sorted(kinds))
    sent = dice.choice(SIGNALS)
    try:
        dice.choice(kinds[kind]).send_signal(sent)
    except psutil.NoSuchProcess:
        return "ended by itself"
    return f"{kind} {sent.name}"


def tree(driver: int) -> list[psutil.Process]:
    try:
        return [
            p for p in psutil.Process(driver).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE
        ]
    except psutil.NoSuchProcess:
        return []


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:60] or process.name()
    except psutil.NoSuchProcess:
        return "ended"


def end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.batch_kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice, count, faults, batches = random.Random(options.seed), Counter[str](), [], 0
    with tempfile.TemporaryDirectory() as place:
        weights = prepare(Path(place))
        victim = Victim(weights, Path(place))
        while sum(count.values()) < options.kills:
            folder = Path(place) / f"batch{batches}"
            (folder / "whole").mkdir(parents=True)
            batch = Batch(weights, folder, 2 * batches * VIDEOS + 1)
            seconds = sum(victim.make(folder / "whole" / f"{n}.mp4", n) for n in batch.numbers)
            count += attack(batch, dice, seconds, options.kills - sum(count.values()))
            for number in batch.numbers:
                alone = folder / str(number)
                alone.mkdir()
                for suffix in ("mp4", "json"):
                    (batch.output / f"{number}.{suffix}").rename(alone / f"{number}.{suffix}")
                if problem := wrong(alone / f"{number}.mp4", folder / "whole" / f"{number}.mp4"):
                    faults.append(f"video {number}: {problem}")
            batches += 1
            print(f"\r{batches} batches, {sum(count.values())} kills", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("\n".join(faults) or f"{batches * VIDEOS} videos equal those of uninterrupted runs")
    print(f"{sum(count.values())} kills: {dict(sorted(count.items()))}; seed {options.seed}")
    return 1 if faults else 0


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)
