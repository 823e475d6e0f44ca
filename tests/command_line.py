"""Helpers that run the command line in this process or in a new one."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

from typer.testing import CliRunner, Result

from omniavatar.cli import app

REPOSITORY = Path(__file__).resolve().parents[1]
NANO = str(REPOSITORY / "configs" / "nano.yaml")
PORTRAIT = str(REPOSITORY / "examples" / "portrait.png")
SPEECH = str(REPOSITORY / "examples" / "speech.flac")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def error_lines(result: Result) -> list[str]:
    return [line for line in plain(result.stderr).splitlines() if line.startswith("error: ")]


def timed(*command: str, cwd: Path = REPOSITORY) -> tuple[float, subprocess.CompletedProcess[str]]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    return time.perf_counter() - start, done
