"""Throughput and overhead of `omniavatar batch`: one worker against several, and a stub engine's known time.

python benchmarks/batch.py overhead [--items 10000] [--workers 32] [--seconds 1.0]
python benchmarks/batch.py throughput --config configs/nano.yaml --hp weights=random,scale=nano --workers 1,2
python benchmarks/batch.py throughput --config configs/inference_1.3B_optimized.yaml --gpus 0,1 --workers 1,2

overhead: items that only sleep. Lost is the share of the workers' time, each's from being ready to the end of
the batch, in which it did not sleep; it is made of pauses between two items, of what the worker does around
the sleep (inside: lease, files, waking up late), and of the end of the queue, where some have no item any
more. throughput: the same requests with each number of workers; the time of a run goes from the moment its
first item starts, so that loading is left out, to its last end; each worker has made one item before it
counts; on the CPU each worker, a single one too, is bound to as many cores as it has threads, and with
--confine the whole batch, driver and Ray too, to as many as its workers have; pauses: the workers' time
between two items that lay ready. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from omniavatar.serve.batch.cores import bind
from omniavatar.serve.batch.destination import FolderDestination
from omniavatar.serve.batch.items import Engine, EngineFactory, Item, Made, Seat
from omniavatar.serve.batch.ray_crew import RayCrew, Seats
from omniavatar.serve.batch.run import BatchResult, run_batch
from omniavatar.serve.batch.scheduler import Rules
from omniavatar.types import AvatarRequest


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
    """Start and end of every item as the driver hears of them."""

    started: list[float]
    ended: list[float]

    def __call__(self, name: str, **fields: Any) -> None:
        if name == "item_started":
            self.started.append(time.monotonic())
        elif name == "item_done":
            self.ended.append(time.monotonic())
        elif name in ("item_failed", "item_retried", "worker_lost", "worker_closed"):
            print(name, fields, flush=True)


def measure(
    items: list[Item], engines: EngineFactory, seats: Seats, workers: int
) -> tuple[BatchResult, _Watch]:
    with tempfile.TemporaryDirectory(prefix="oa-bench-") as folder:
        watch = _Watch([], [])
        destination = FolderDestination(Path(folder) / "out")
        crew = lambda: RayCrew(seats, workers, engines, destination)  # noqa: E731
        result = run_batch(items, crew, destination, Path(folder) / "run", Rules(), watch)
        if result.ledger.error is not None:
            raise result.ledger.error
        return result, watch


def overhead(count: int, workers: int, seconds: float) -> dict[str, Any]:
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
    told = ", ".join(f"{name} {100 * share:.2f} %" for name, share in parts.items())
    print(
        f"{count} items of {seconds:g} s, {workers} workers: {summary['wall_seconds']:.1f} s in all, "
        f"{100 * lost:.2f} % lost ({told}); "
        f"pause between two items {1000 * summary['mean_pause_seconds']:.2f} ms; load before {load:.1f}"
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


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    from omniavatar.config.load import load_config
    from omniavatar.engine.requests_file import RequestLine
    from omniavatar.serve.batch.pipelines import AvatarEngines, make_items

    gpus = tuple(arguments.gpus.split(",")) if arguments.gpus else ()
    cores = sorted(os.sched_getaffinity(0))
    threads = [] if gpus else [f"threads={arguments.threads}"]
    config = load_config(arguments.config, [*arguments.hp, *threads]).config
    runs: dict[int, list[float]] = {count: [] for count in arguments.workers}
    pauses: dict[int, list[float]] = {count: [] for count in arguments.workers}
    with as_file(files("omniavatar.assets")) as assets:
        voice = assets / "speech.flac" if config.model.use_audio else None
        lines = [
            RequestLine(i, i, f"A woman speaks, take {i}", assets / "portrait.png", voice)
            for i in range(arguments.items)
        ]
        for _ in range(arguments.repeats):
            for count in arguments.workers:
                seats = Seats(gpus[:count], 1.0 if gpus else 0, arguments.threads)
                engines = AvatarEngines(config, pin=arguments.pin)
                if arguments.confine:
                    bind(cores[: count * arguments.threads])
                result, watch = measure(make_items(lines, config), engines, seats, count)
                begun, ended = watch.ended[count - 1], watch.ended[-1]
                runs[count].append((arguments.items - count) / (ended - begun))
                pauses[count].append(result.summary["pause_share"] or 0.0)
                print(
                    f"{count} workers: {runs[count][-1]:.4f} items/s after each one's first, "
                    f"{100 * pauses[count][-1]:.2f} % pauses; load after {os.getloadavg()[0]:.1f}",
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
    told = ("hp", "items", "threads", "pin", "confine")
    return {"config": str(arguments.config), **{n: getattr(arguments, n) for n in told}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    sleepy = what.add_parser("overhead")
    sleepy.add_argument("--items", type=int, default=10_000)
    sleepy.add_argument("--workers", type=int, default=32)
    sleepy.add_argument("--seconds", type=float, default=1.0)
    real = what.add_parser("throughput")
    real.add_argument("--config", type=Path, required=True)
    real.add_argument("--hp", action="append", default=[])
    real.add_argument("--gpus", default="")
    real.add_argument("--threads", type=int, default=1, help="CPU threads of a worker")
    real.add_argument(
        "--pin", action=argparse.BooleanOptionalAction, default=True, help="CPU workers on cores of their own"
    )
    real.add_argument("--confine", action="store_true", help="driver and Ray on the workers' cores too")
    real.add_argument("--items", type=int, default=16)
    real.add_argument("--repeats", type=int, default=3)
    real.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    arguments = parser.parse_args()
    if arguments.what == "overhead":
        figures = overhead(arguments.items, arguments.workers, arguments.seconds)
    else:
        figures = throughput(arguments)
    print(json.dumps({"benchmark": f"batch {arguments.what}", "machine": platform.node(), **figures}))


if __name__ == "__main__":
    main()
