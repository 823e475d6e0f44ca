"""Runs every configuration's measurement in a process of its own, one after the other.

A process of its own gives each configuration a clean device: nothing stays in memory, and one that crashes
is a row of the table that says so. The children's words are kept and shown only when they fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omniavatar.errors import ConfigError
from omniavatar.measure.benchmark.row import Options


def find_configs(places: Sequence[Path]) -> list[Path]:
    """YAML files among `places`, those of a folder in the order of their names. Raises ConfigError."""
    found: list[Path] = []
    for place in places:
        inside = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
        if not inside or not inside[0].is_file():
            raise ConfigError(f"{place}: no YAML config there; name a config file or a folder of them")
        found += inside
    return found


def measure_all(
    configs: Sequence[Path], options: Options, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row for each configuration. report: told what is going on, a line at a time."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="omniavatar-") as folder:
        for number, config in enumerate(configs):
            report(f"{number + 1} of {len(configs)}: {config}")
            result = Path(folder) / f"{number}.json"
            row = _measure(replace(options, config=str(config), result=str(result)))
            if row["status"] != "measured":
                report(f"  {row['status']}: {row['reason']}")
            rows.append(row)
    return rows


def _measure(options: Options) -> dict[str, Any]:
    command = [sys.executable, "-m", "omniavatar.measure.benchmark.row", json.dumps(asdict(options))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = Path(options.result)
    if result.is_file():
        row: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return row
    last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
    reason = f"ended with code {done.returncode}: {last[0]}"
    return {"config": options.config, "name": Path(options.config).stem, "status": "failed", "reason": reason}
