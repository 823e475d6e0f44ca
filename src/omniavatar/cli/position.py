"""What Ctrl-C leaves: which windows are finished, where they are, and the command that goes on."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from omniavatar.cli.common import INTERRUPT_NOTE
from omniavatar.engine.events import RequestStarted, WindowFinished
from omniavatar.types import Event


class Position:
    """A listener that knows which windows of the current video are finished."""

    def __init__(self) -> None:
        self.finished = self.windows = 0
        self.name = ""

    def __call__(self, event: Event) -> None:
        match event:
            case RequestStarted():
                self.finished, self.windows = event.resumed_windows, event.windows
                self.name = event.name
            case WindowFinished():
                self.finished = event.window + 1

    def interrupted(self, output: Path, again: str) -> str:
        """The line for Ctrl-C during a video in the folder of `output`. again: the command that continues."""
        if not self.windows:
            return INTERRUPT_NOTE
        if not self.finished:
            return f"interrupted before the first of {self.windows} windows was finished; run again: {again}"
        return (
            f"interrupted; {self.finished} of {self.windows} windows are finished and kept in "
            f"{output.with_name(self.name)}.job; "
            f"to continue after them: {again}"
        )


def command_name() -> str:
    """How the user can call this program: `omniavatar`, or the path of the script if it is not on PATH."""
    if shutil.which("omniavatar") or Path(sys.argv[0]).name != "omniavatar":
        return "omniavatar"
    return shlex.quote(sys.argv[0])


def command_again(words: Sequence[str]) -> str:
    """The command line `omniavatar <words>`, without `--no-resume`, which would start over."""
    return f"{command_name()} {shlex.join(word for word in words if word != '--no-resume')}"
