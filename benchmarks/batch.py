"""Throughput and overhead of `omniavatar batch`: one worker against several, and a stub engine's known time.

    python -m benchmarks batch overhead [--items 10000] [--workers 32] [--seconds 1.0]
    python -m benchmarks batch throughput --config configs/nano.yaml --hp weights=random scale=nano
    python -m benchmarks batch throughput --config configs/inference_1.3B_optimized.yaml --gpus 0,1

overhead: items that only sleep. Lost is the share of the workers' time, from ready to the end of the batch,
in which they did not sleep. It has three parts: pauses between two items, what a worker does around the sleep
(inside: lease, files, waking up late), and the end of the queue, where some workers have no item left.
throughput: the same requests with each number of workers. Each worker makes one item before it counts, so
loading is left out. On the CPU each worker is bound to as many cores as it has threads; --confine binds
driver and Ray to the same cores. Pauses are the workers' time between two items while the queue had some.
Prints the figures, then one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.options import add_config, add_hp, add_repeats, make_parser, numbers, words
from benchmarks.shared.report import print_result, print_table, spread
from omniavatar.assets import PORTRAIT, SPEECH
from omniavatar.serve.batch.cores import bind
from omniavatar.serve.batch.destination import FolderDestination
from omniavatar.serve.batch.events import (
    ItemDone,
    ItemFailed,
    ItemRetried,
    ItemStarted,
    WorkerClosed,
    WorkerLost,
)
from omniavatar.serve.batch.items import Engine, EngineFactory, Item, Made, Seat
from omniavatar.serve.batch.ray_crew import RayCrew, Seats
from omniavatar.serve.batch.rules import Rules
from omniavatar.serve.batch.run import BatchResult, run_batch
from omniavatar.types import AvatarRequest, Event


@dataclass(frozen=True)
class Sleepers:
    """Engines whose items take `seconds` of sleep and write one small file."""

    seconds: float

    def __call__(self, seat: Seat) -> Engine:
        return _Sleeper(self.seconds)


class _Sleeper:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(
        self, request: AvatarRequest, output: Path, fresh: bool, on_window: Callable[[int, int], None]
    ) -> Made:
        time.sleep(self._seconds)
        output.touch()
        return Made(1, 1, 0, self._seconds)

    def device(self) -> str:
        return "sleep"

    def intact(self) -> bool:
        return True


@dataclass
class _Watch:
    """Start and end of every item, as the driver's events report them."""

    started: list[float]
    ended: list[float]

    def __call__(self, event: Event) -> None:
        if isinstance(event, ItemStarted):
            self.started.append(time.monotonic())
        elif isinstance(event, ItemDone):
            self.ended.append(time.monotonic())
        elif isinstance(event, ItemFailed | ItemRetried | WorkerLost | WorkerClosed):
            print(event.kind, event.as_dict(), flush=True)


def measure(
    items: list[Item], engines: EngineFactory, seats: Seats, workers: int
) -> tuple[BatchResult, _Watch]:
    """Run one batch in temporary folders. Raises the error that ended it."""
    with tempfile.TemporaryDirectory(prefix="oa-bench-") as folder:
        watch = _Watch([], [])
        destination = FolderDestination(Path(folder) / "out")
        crew = lambda: RayCrew(seats, workers, engines, destination)  # noqa: E731
        result = run_batch(items, crew, destination, Path(folder) / "run", Rules(), watch)
        if result.ledger.error is not None:
            raise result.ledger.error
        return result, watch


def overhead(count: int, workers: int, seconds: float) -> dict[str, Any]:
    """The share of the workers' time that is lost, and its parts."""
    items = [
        Item(f"{i:06d}", f"{i:06d}.mp4", i, f"p{i}", "", AvatarRequest("p", "face.png")) for i in range(count)
    ]
    load = os.getloadavg()[0]
    result, _ = measure(items, Sleepers(seconds), Seats((), 0, 1), workers)
    summary = result.summary
    present = sum(row["ready_seconds"] for row in summary["workers"])
    busy = sum(row["busy_seconds"] for row in summary["workers"])
    paused = busy * summary["pause_share"] / (1 - summary["pause_share"])
    parts = {
        "pauses": paused / present,
        "inside": (busy - count * seconds) / present,
        "end": (present - busy - paused) / present,
    }
    lost = sum(parts.values())
    shares = ", ".join(f"{name} {share:.2%}" for name, share in parts.items())
    print(
        f"{count} items of {seconds:g} s, {workers} workers: {summary['wall_seconds']:.1f} s in all, "
        f"{lost:.2%} lost ({shares}); pause between two items {1000 * summary['mean_pause_seconds']:.2f} ms; "
        f"load before {load:.1f}"
    )
    return {
        "items": count,
        "workers": workers,
        "item_seconds": seconds,
        "lost": lost,
        **parts,
        "gap_seconds": summary["mean_pause_seconds"],
        "wall_seconds": summary["wall_seconds"],
        "load_before": load,
    }


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Items a second with each number of workers."""
    from omniavatar.config.load import load_config
    from omniavatar.engine.requests_file import RequestLine
    from omniavatar.serve.batch.pipelines import AvatarEngines, make_items

    gpus = tuple(options.gpus)
    cores = sorted(os.sched_getaffinity(0))
    threads = [] if gpus else [f"threads={options.threads}"]
    config = load_config(options.config, [*options.hp, *threads]).config
    runs: dict[int, list[float]] = {count: [] for count in options.workers}
    pauses: dict[int, list[float]] = {count: [] for count in options.workers}
    voice = SPEECH if config.model.use_audio else None
    lines = [RequestLine(i, i, f"A woman speaks, take {i}", PORTRAIT, voice) for i in range(options.items)]
    for _ in range(options.repeats):
        for count in options.workers:
            seats = Seats(gpus[:count], 1.0 if gpus else 0, options.threads)
            engines = AvatarEngines(config, pin=options.pin)
            if options.confine:
                bind(cores[: count * options.threads])
            result, watch = measure(make_items(lines, config), engines, seats, count)
            begun, ended = watch.ended[count - 1], watch.ended[-1]
            runs[count].append((options.items - count) / (ended - begun))
            pauses[count].append(result.summary["pause_share"] or 0.0)
            print(
                f"{count} workers: {runs[count][-1]:.4f} items/s after each worker's first, "
                f"{pauses[count][-1]:.2%} pauses; load after {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    one = statistics.median(runs[min(runs)]) / min(runs)
    rows = [
        {
            "workers": count,
            "items_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "pauses": statistics.median(pauses[count]),
            "of_linear": statistics.median(rates) / (one * count),
        }
        for count, rates in runs.items()
    ]
    print_table(
        ["workers", "items/s (min..max)", "of linear", "pauses"],
        [
            [
                row["workers"],
                spread(row["items_per_second"], *row["spread"], digits=4),
                f"{row['of_linear']:.2f}",
                f"{row['pauses']:.2%}",
            ]
            for row in rows
        ],
    )
    names = ("config", "hp", "items", "threads", "pin", "confine")
    return {**{name: getattr(options, name) for name in names}, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    sleepy = kinds.add_parser("overhead", help="items that only sleep")
    sleepy.add_argument("--items", type=int, default=10_000)
    sleepy.add_argument("--workers", type=int, default=32)
    sleepy.add_argument("--seconds", type=float, default=1.0, help="sleep of one item")
    real = kinds.add_parser("throughput", help="real requests, by number of workers")
    add_config(real)
    add_hp(real)
    real.add_argument("--gpus", type=words, default=[], help="GPU numbers; without them: the CPU")
    real.add_argument("--threads", type=int, default=1, help="CPU threads of a worker")
    real.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, default=True, help="bind CPU workers to cores"
    )
    real.add_argument("--confine", action="store_true", help="bind driver and Ray to the workers' cores too")
    real.add_argument("--items", type=int, default=16)
    add_repeats(real, 3)
    real.add_argument("--workers", type=numbers, default=[1, 2])
    options = parser.parse_args(arguments)
    if options.kind == "overhead":
        figures = overhead(options.items, options.workers, options.seconds)
    else:
        figures = throughput(options)
    print_result(f"batch {options.kind}", machine=platform.node(), **figures)
