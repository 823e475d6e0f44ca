"""Seconds of a video on the CPU, alone and beside other jobs, for several ways in which idle threads wait.

    python -m benchmarks shared_machine [--spins default,100,1000,10000,passive] [--beside 2] [--repeats 3]

Makes a short video of the packaged model, each time in a new process: alone, and beside processes that never
pause. `default` is what libgomp does without a setting, `ours` is what the command line sets, `passive` does
not spin, a number is GOMP_SPINCOUNT. With one other job a core, a fair share is half of each core, so a fair
time is twice the time alone. Orders alternate. Prints a table with CPU seconds and whether all videos have
the same bytes, then one line of JSON.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.shared.inputs import module_environment, speech_folder
from benchmarks.shared.options import add_repeats, make_parser, words
from benchmarks.shared.report import print_result, print_table, spread
from omniavatar.assets import pocket
from omniavatar.parallel.threads import WAIT_SETTINGS, bounded_spin

DEFAULT_ROUNDS = 300_000
FOREVER = "while True: pass"


@dataclass(frozen=True)
class Run:
    """One video: wall-clock and CPU seconds of its process, how often its threads slept, its bytes' hash."""

    seconds: float
    cpu_seconds: float
    sleeps: int
    digest: str


def wait_settings(name: str) -> dict[str, str]:
    """The environment variables of one way to wait."""
    if name == "default":
        return {"GOMP_SPINCOUNT": str(DEFAULT_ROUNDS)}
    if name == "ours":
        return dict(bounded_spin({}))
    return {"OMP_WAIT_POLICY": "PASSIVE"} if name == "passive" else {"GOMP_SPINCOUNT": name}


@contextmanager
def other_jobs(count: int) -> Iterator[None]:
    """`count` processes that use a core each, as long as the body runs."""
    jobs = [subprocess.Popen([sys.executable, "-c", FOREVER]) for _ in range(count)]
    try:
        yield
    finally:
        for job in jobs:
            job.kill()
            job.wait()


def make_video(folder: Path, voice: Path, settings: Mapping[str, str]) -> Run:
    environment = {k: v for k, v in module_environment().items() if k not in WAIT_SETTINGS}
    output = folder / "out.mp4"
    command = [sys.executable, "-m", "omniavatar.cli", "generate", "--config", "pocket", "--no-resume"]
    command += ["--prompt", pocket.PROMPT, "--image", str(pocket.PORTRAIT), "--audio", str(voice)]
    command += ["--output", str(output), "--quiet"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, env={**environment, **settings}, stdout=subprocess.DEVNULL)
    _, code, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if code:
        raise SystemExit(f"the video failed with wait status {code}")
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_nvcsw, digest)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument("--spins", default="default,ours,passive", type=words, help="ways to wait")
    parser.add_argument("--beside", type=int, default=os.cpu_count(), help="other jobs (default: one a core)")
    parser.add_argument("--only-beside", action="store_true", help="leave out the runs alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of the voice")
    add_repeats(parser, 3)
    options = parser.parse_args(arguments)
    jobs = [options.beside] if options.only_beside else [0, options.beside]
    runs: dict[tuple[str, int], list[Run]] = {(name, count): [] for name in options.spins for count in jobs}
    with speech_folder(options.seconds / 60) as folder:
        for repeat in range(options.repeats):
            names = options.spins if repeat % 2 == 0 else options.spins[::-1]
            for count in jobs:
                with other_jobs(count):
                    for name in names:
                        run = make_video(folder, folder / "speech.wav", wait_settings(name))
                        runs[name, count].append(run)
                        shown = f"{run.seconds:.1f} s, {run.cpu_seconds:.1f} CPU s, {run.sleeps} sleeps"
                        print(f"{name}, beside {count}: {shown}", file=sys.stderr, flush=True)
    rows = []
    for (name, count), made in runs.items():
        seconds = [run.seconds for run in made]
        middle = spread(statistics.median(seconds), min(seconds), max(seconds), digits=1)
        cpu = f"{statistics.median(run.cpu_seconds for run in made):.1f}"
        rows.append((name, count, middle, cpu, round(statistics.median(run.sleeps for run in made))))
    print_table(("waiting", "other jobs", "seconds", "CPU seconds", "sleeps"), rows)
    same = len({run.digest for made in runs.values() for run in made}) == 1
    print(f"same bytes: {'yes' if same else 'NO'}")
    values = [
        {"waiting": n, "other_jobs": c, "runs": [asdict(r) for r in made]} for (n, c), made in runs.items()
    ]
    print_result("shared_machine", cores=os.cpu_count(), load=os.getloadavg(), same_bytes=same, runs=values)
