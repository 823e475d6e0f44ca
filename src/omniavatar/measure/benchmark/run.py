"""Runs the measurement of every configuration, each in a new process, one after the other.

A new process gives each configuration an empty device, and one that crashes becomes a row of the table that
says so. The output of a process is shown only if it fails.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from omniavatar.config.load import PACKAGED
from omniavatar.errors import ConfigError
from omniavatar.measure.benchmark.row import Options
from omniavatar.measure.benchmark.rows import FailedRow, MeasuredRow, Row, row_from_json
from omniavatar.media.temporary import temporary_folder


def find_configs(places: Sequence[Path]) -> list[Path]:
    """YAML files among `places`, those of a folder sorted by name. Raises ConfigError.

    places: files, folders, `pocket` or `pocket-live`.
    """
    found: list[Path] = []
    for place in (PACKAGED.get(str(each), each) for each in places):
        inside = sorted(place.glob("*.yaml")) if place.is_dir() else [place]
        if not inside or not inside[0].is_file():
            raise ConfigError(
                f"{place}: no YAML config there; name a config file, a folder of them, pocket or pocket-live"
            )
        found += inside
    return found


def measure_all(configs: Sequence[Path], options: Options, report: Callable[[str], None]) -> tuple[Row, ...]:
    """A row for each configuration. report: called with each line of progress."""
    rows: list[Row] = []
    with temporary_folder() as folder:
        for number, config in enumerate(configs):
            report(f"{number + 1} of {len(configs)}: {config}")
            result = folder / f"{number}.json"
            row = _measure(replace(options, config=str(config), result=str(result)))
            if not isinstance(row, MeasuredRow):
                report(f"  {row.status}: {row.reason}")
            rows.append(row)
    return tuple(rows)


def _measure(options: Options) -> Row:
    command = [sys.executable, "-m", "omniavatar.measure.benchmark.row", json.dumps(asdict(options))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = Path(options.result)
    if result.is_file():
        return row_from_json(result.read_text(encoding="utf-8"))
    last = done.stderr.strip().splitlines()[-1:] or ["without any message"]
    reason = f"ended with code {done.returncode}: {last[0]}"
    return FailedRow(config=options.config, name=Path(options.config).stem, reason=reason)
