"""`generate` in several processes, for tests on CPUs and GPUs: its command, and a rank that fails."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import yaml

from engine import overrides, portrait

FAULTS = {
    "memory": (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried')",
        "rank 1: max_tokens: needs more GPU memory than is free (CUDA out of memory)",
    ),
    "death": ("os.kill(os.getpid(), signal.SIGKILL)", "its process was killed by SIGKILL"),
}
"""What rank 1 does in a forward, and the message the user sees."""
MOST_TO_END_S = 90
"""Limit of the time from the fault to the end of all processes on a busy machine; exchanges wait longer."""


def generate_command(checkpoint: Path, folder: Path, **changes: Any) -> list[str]:
    """Arguments of `generate` for the nano model; writes a configuration and a portrait into `folder`."""
    PIL.Image.fromarray(portrait()).save(folder / "face.png")
    settings = overrides(checkpoint, folder / "cache", seq_len=26, crf=0, **changes)
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    inputs = ["--config", str(folder / "c.yaml"), "--image", str(folder / "face.png")]
    return ["generate", *inputs, "--prompt", "a"]


def ended_by_fault(fault: str, command: list[str], folder: Path) -> tuple[float, int, str]:
    """Run two processes; rank 1 fails in its fourth forward, while rank 0 waits in an exchange with it.

    Returns the seconds from the fault to the end of all processes, the exit code, and standard error.
    """
    act, _ = FAULTS[fault]
    worker, mark = folder / "worker.py", folder / "fault"
    worker.write_text(
        "import os, signal, sys, pathlib\nimport torch\nfrom omniavatar.cli import main\n"
        "from omniavatar.model.dit import WanDiT\ndone = []\nusual = WanDiT.run_blocks\n"
        "def run_blocks(self, tokens, inputs):\n    done.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(done) > 3:\n"
        f"        pathlib.Path({str(mark)!r}).touch()\n        {act}\n"
        "    return usual(self, tokens, inputs)\n"
        "WanDiT.run_blocks = run_blocks\nmain(sys.argv[1:])\n"
    )
    arguments = [*command, "--output", str(folder / "x.mp4"), "--hp=sp_size=2"]
    program = [sys.executable, str(worker), *arguments]
    launcher = (
        "import sys\n"
        "from omniavatar.cli.common import user_errors\n"
        "from omniavatar.parallel.launch import launch\n"
        f"with user_errors():\n    sys.exit(launch({program!r}, ['rank 0', 'rank 1']))"
    )
    ended = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True, timeout=600)
    return time.time() - mark.stat().st_mtime, ended.returncode, ended.stderr


def check_fault(fault: str, command: list[str], folder: Path) -> None:
    """Assert that all processes end in time, report the fault's message and write no video."""
    seconds, code, errors_text = ended_by_fault(fault, command, folder)
    assert seconds < MOST_TO_END_S
    _, message = FAULTS[fault]
    if fault == "memory":
        assert code == 7, errors_text
        lines = (
            line for line in errors_text.splitlines() if not line.startswith("video encoder:")
        )  # NVENC's refusal
        errors = [line for line in lines if "error" in line.lower()]
        assert len(errors) == 1 and message in errors[0], errors_text
    else:
        assert message in errors_text and "lost contact" not in errors_text, errors_text
    assert not (folder / "x.mp4").exists()
