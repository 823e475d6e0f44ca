"""The tables of docs/deploy.md, from measured results: videos an hour, and a queue under ten times that load.

A row of `benchmarks/results/` (benchmark `whole_video`, one H100) gives the seconds of a window, and those
that a video needs beside its windows. The planner gives the windows of a video. Eight GPUs are eight workers,
each with videos of its own.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniavatar.config.load import load_config
from omniavatar.plan.run import plan_run
from omniavatar.serve.settings import ServeSettings

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CARD = "NVIDIA H100 80GB HBM3"
VOICES = (10, 60)
"""Seconds of voice of the videos in the table."""
GPUS = (1, 8)
LOAD = 10
"""Times the capacity, in the second table."""
QUEUE = re.compile(r"(?P<date>[\d-]+)_cpu_queue_load\.json")
CLIENTS = re.compile(r"(?P<date>[\d-]+)_cpu_stress_clients\.json")


@dataclass(frozen=True)
class Speed:
    """What was measured. window: seconds of one. rest: seconds of a video beside its windows.

    size: (height, width).
    """

    scale: str
    config: str
    settings: tuple[str, ...]
    window: float
    rest: float
    file: str
    size: tuple[int, int] = (400, 720)

    @property
    def name(self) -> str:
        """The configuration, and what was set beside the precision."""
        shown = [text for text in self.settings if not text.startswith(("quantize", "attention", "loras"))]
        height, width = self.size
        parts = [self.scale, f"`{self.config}`", *(f"`{text}`" for text in shown), f"{height}x{width}"]
        return ", ".join(parts)

    def seconds(self, voice: float) -> tuple[int, float]:
        """Windows and seconds of a video with so many seconds of voice."""
        # the LoRA files of the 4-step configurations are not part of a clone
        config = load_config(ROOT / "configs" / self.config, [*self.settings, "loras=[]"]).config
        samples = round((voice + config.video.silence_duration_s) * config.video.sample_rate)
        windows = len(plan_run(config, self.size, samples).windows)
        return windows, windows * self.window + self.rest

    def an_hour(self, voice: float, gpus: int) -> float:
        return gpus * 3600 / self.seconds(voice)[1]


def speeds() -> list[Speed]:
    """The newest result of each configuration, fastest first."""
    found: dict[str, Speed] = {}
    for path in sorted(RESULTS.glob("*h100*")):
        for row in _rows(path):
            if row.get("benchmark") != "whole_video" or row.get("device") != CARD:
                continue
            window = row["window_s"]["median"]
            rest = max(0.0, row["seconds"] - row["windows"] * window)
            size = tuple(row.get("size") or Speed.size)
            settings = tuple(text for text in row["hp"] if not text.startswith("loras"))
            speed = Speed(row["scale"], row["config"], settings, window, rest, path.name, size)
            found[speed.name] = speed
    return sorted(found.values(), key=lambda speed: speed.window)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    for line in lines:
        value = json.loads(line)
        if isinstance(value, dict):
            yield value


def capacity() -> str:
    """The table of videos an hour."""
    heads = [
        "configuration (float8)",
        "a window, s",
        *(f"a video of {voice} s" for voice in VOICES),
        *(
            f"videos of {voice} s an hour, {gpus} GPU{'s' if gpus > 1 else ''}"
            for gpus in GPUS
            for voice in VOICES
        ),
    ]
    rows = []
    for speed in speeds():
        videos = [speed.seconds(voice) for voice in VOICES]
        rows.append(
            [
                speed.name,
                f"{speed.window:.2f}",
                *(f"{windows} windows, {seconds:.0f} s" for windows, seconds in videos),
                *(f"{speed.an_hour(voice, gpus):,.0f}" for gpus in GPUS for voice in VOICES),
            ]
        )
    sources = ", ".join(sorted({f"`{speed.file}`" for speed in speeds()}))
    gpus, times, file = scaling()
    note = (
        f"From {sources}. The windows were measured on one GPU. Eight GPUs are a projection: eight workers "
        f"that share the queue only. {gpus} workers on {gpus} GPUs made {times:.2f} times as much as one "
        f"(`{file}`)."
    )
    return f"{_table(heads, rows)}\n\n{note}\n"


def scaling() -> tuple[int, float, str]:
    """Most workers of a measured batch on one host, their gain over one (by medians), and the file."""
    path = RESULTS / "2026-11-26_h100x4_scaling.jsonl"
    (row,) = (row for row in _rows(path) if row.get("benchmark") == "batch throughput")
    found: dict[int, list[float]] = {}
    for line in row["lines"]:
        count, rate = re.findall(r"(\d+) workers: ([\d.]+) items/s", line)[0]
        found.setdefault(int(count), []).append(float(rate))
    most = max(found)
    return most, statistics.median(found[most]) / statistics.median(found[1]), path.name


def overload() -> str:
    """The table of a queue to which ten times as much comes as eight GPUs make."""
    length = ServeSettings().queue_length
    heads = [
        f"configuration, videos of {VOICES[0]} s, 8 GPUs",
        "made an hour",
        f"come an hour ({LOAD}x)",
        f"queue of {length} full after",
        "then refused",
        "wait of the last accepted",
    ]
    rows = []
    for speed in speeds():
        made = speed.an_hour(VOICES[0], 8)
        rows.append(
            [
                speed.name,
                f"{made:,.0f}",
                f"{LOAD * made:,.0f}",
                f"{60 * length / ((LOAD - 1) * made):.1f} min",
                f"{100 * (LOAD - 1) / LOAD:.0f} %",
                _duration(3600 * length / made),
            ]
        )
    return _table(heads, rows) + "\n"


def measured() -> str:
    """The table of the measured run with a stub engine (`python -m benchmarks queue_load`)."""
    path = max(path for path in RESULTS.iterdir() if QUEUE.fullmatch(path.name))
    (row,) = _rows(path)
    made, come, length = row["capacity_per_s"], row["offered_per_s"], row["queue_length"]
    values = [
        ("capacity of the workers", f"{made:.1f} a second", ""),
        ("requests", f"{come:.1f} a second for {row['seconds']:.0f} s ({row['offered']:,})", ""),
        ("accepted", f"{row['accepted']:,}", f"{length + made * row['seconds']:,.0f}"),
        (
            "refused with 503 `queue_full`",
            f"{row['refused']:,}",
            f"{come * row['seconds'] - length - made * row['seconds']:,.0f}",
        ),
        (
            "other answers, lost jobs, jobs made twice",
            f"{row['others']}, {row['lost']}, {row['twice']}",
            "0, 0, 0",
        ),
        ("queue full after", f"{row['full_after_s']:.1f} s", f"{length / (come - made):.1f} s"),
        (
            "wait of a job accepted into the full queue",
            f"{row['full_wait_s']:.1f} s",
            f"{length / made:.1f} s",
        ),
        ("made under this load", f"{row['made_per_s']:.1f} a second", f"{made:.1f} a second"),
        (
            "an answer, median and p99",
            f"{1000 * row['answer_s']['median']:.0f} and {1000 * row['answer_s']['p99']:.0f} ms",
            "",
        ),
    ]
    note = f"From `{path.name}`, {row['device']}. Server, workers and clients shared the cores."
    return f"{_table(['', 'measured', 'by arithmetic'], [list(each) for each in values])}\n\n{note}\n"


def clients() -> str:
    """The table of the stress with many clients (`python -m stress clients`)."""
    path = max(path for path in RESULTS.iterdir() if CLIENTS.fullmatch(path.name))
    (row,) = _rows(path)
    kills, cpu = row["kills"], row["cpu_s"]
    values = [
        ("clients, seconds", f"{row['clients']}, {row['seconds']:.0f}"),
        (
            "kills",
            f"{kills['workers'] - kills['hosts']} of a worker, {kills['hosts']} of all workers with their "
            f"host, {kills['server']} of the server",
        ),
        ("down by a kill of the server, until it answers", " and ".join(f"{s:.1f} s" for s in row["down_s"])),
        (
            "accepted, completed, lost, made twice",
            f"{row['accepted']:,}, {row['ended']['completed']:,}, {row['lost']}, {row['completed_twice']}",
        ),
        ("time to accept, median and p99", _milliseconds(row["accept_p50_s"], row["accept_p99_s"])),
        (
            "the same with tries while the server is down, p99",
            _milliseconds(row["accept_with_retries_p99_s"]),
        ),
        ("time of a poll, p99", _milliseconds(row["poll_p99_s"])),
        (
            "processor time of server, workers, clients",
            ", ".join(f"{cpu[name]:.0f} s" for name in ("server", "workers", "clients")),
        ),
    ]
    note = f"From `{path.name}`, {row['device']}, which server, workers and clients shared."
    return f"{_table(['', 'measured'], [list(each) for each in values])}\n\n{note}\n"


def _milliseconds(*seconds: float) -> str:
    return " and ".join(f"{1000 * each:.0f}" for each in seconds) + " ms"


def page(text: str) -> str:
    """The page with its tables in place, between `<!-- NAME: made -->` and `<!-- end -->`."""
    tables = {"capacity": capacity, "overload": overload, "measured": measured, "clients": clients}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by python -m docs.generate -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"docs/deploy.md lacks the place of {name}")
        text = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
