"""Helpers that run the command line in this process or in a new one."""

from __future__ import annotations

import re
import resource
import subprocess
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
    """Processor time of the command, which other work on the machine does not change, and how it ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done
