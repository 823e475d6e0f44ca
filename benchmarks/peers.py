"""This package beside other engines: transformer, decode and encode with random weights of equal sizes.

    python -m benchmarks peers [--engines ours,ours:fp8,diffusers,diffusers:compile] [--scale 14B]

Each engine runs in a process of its own, in turn, `--rounds` times over, on one machine: so a warm or busy
machine shows in the spread and not in the comparison. An engine that is not installed is named and left out.
`--engines` takes adapters of benchmarks/engines/ by name, and those of other engines by module or file; see
docs/peers.md. Prints a table (median, fastest and slowest run of all rounds; how often ours is as fast), then
one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.engines.adapter import PARTS, Sizes
from benchmarks.shared.inputs import module_environment
from benchmarks.shared.options import add_repeats, make_parser, words
from benchmarks.shared.report import print_result, print_table, spread
from omniavatar.errors import ConfigError, OmniAvatarError


class EngineError(OmniAvatarError):
    """An engine's process ended without a result."""


def run_engine(engine: str, sizes: Sizes, parts: Sequence[str], repeats: int) -> dict[str, Any]:
    """The result of one process. Raises EngineError if it crashed."""
    name, _, option = engine.partition(":")
    given = {"name": name, "option": option, "sizes": asdict(sizes), "wanted": parts, "repeats": repeats}
    command = [sys.executable, "-m", "benchmarks.engines.process", json.dumps(given)]
    done = subprocess.run(command, env=module_environment(), capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"{engine}: its process ended with code {done.returncode} ({last})")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(
    engines: Sequence[str], sizes: Sizes, parts: Sequence[str], repeats: int, rounds: int
) -> list[dict[str, Any]]:
    """One row an engine: seconds of all rounds by part. Those without a result have a reason."""
    rows: dict[str, dict[str, Any]] = {engine: {"engine": engine, "seconds": {}} for engine in engines}
    for number in range(rounds):
        for engine in engines:
            row = rows[engine]
            if "reason" in row:
                continue
            found = run_engine(engine, sizes, parts, repeats)
            for part, seconds in found.pop("seconds", {}).items():
                row["seconds"].setdefault(part, []).extend(seconds)
            row |= found
            what = row.get("reason") or {part: statistics.median(s) for part, s in row["seconds"].items()}
            print(f"round {number + 1}, {engine}: {what}", flush=True)
    return list(rows.values())


def cells(row: Mapping[str, Any], first: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """A row of the table: seconds of each part, and how many times the first engine's."""
    texts = [row["engine"]]
    for part in parts:
        times, base = row["seconds"].get(part), first["seconds"].get(part)
        if not times:
            texts.append(row.get("reason", "-") if part == parts[0] else "-")
            continue
        ratio = f", {statistics.median(times) / statistics.median(base):.2f}x" if base else ""
        texts.append(spread(statistics.median(times), min(times), max(times)) + ratio)
    peak = row.get("peak_gpu_bytes")
    return [*texts, "-" if peak is None else f"{peak / 2**30:.1f}"]


def latent_size(text: str) -> tuple[int, int, int]:
    """`27x50x90`. Raises ValueError."""
    frames, height, width = (int(part) for part in text.split("x"))
    if min(frames, height, width) < 1 or height % 2 or width % 2:
        raise ValueError("latent frames, height and width are positive; height and width are even")
    return frames, height, width


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__name__, __doc__)
    parser.add_argument(
        "--engines", type=words, default=["ours", "ours:fp8", "diffusers", "diffusers:compile"]
    )
    parser.add_argument("--scale", choices=["nano", "1.3B", "14B"], default="1.3B")
    parser.add_argument(
        "--latent", type=latent_size, default=(27, 50, 90), help="of a window, such as 27x50x90 (400x720)"
    )
    parser.add_argument("--parts", type=words, default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument(
        "--rounds", type=int, default=2, help="processes of each engine, in turn (default: 2)"
    )
    add_repeats(parser)
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown or not given.engines or min(given.rounds, given.repeats) < 1:
        what = f"--parts {unknown[0]}" if unknown else "--engines, --rounds and --repeats"
        raise ConfigError(
            f"{what}: use parts of {', '.join(PARTS)}, an engine, one round and one repeat or more"
        )
    sizes = Sizes(given.scale, given.latent, given.device, given.dtype)
    rows = measure(given.engines, sizes, given.parts, given.repeats, given.rounds)
    print_table(
        ["engine", *(f"{part}, s" for part in given.parts), "peak GiB"],
        [cells(row, rows[0], given.parts) for row in rows],
    )
    print_result(
        "peers",
        torch.device(given.device),
        scale=given.scale,
        latent=given.latent,
        dtype=given.dtype,
        rounds=given.rounds,
        repeats=given.repeats,
        rows=rows,
    )
