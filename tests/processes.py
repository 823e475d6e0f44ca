"""Child processes that tests send signals to."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def default_interrupt() -> Iterator[None]:
    """Children started inside get the default action of SIGINT.

    A suite started under `nohup` or in the background of a script ignores SIGINT, and its children would
    inherit that. A handler set here becomes the default action when a child runs its program.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """`subprocess.Popen` in text mode whose child reacts to SIGINT however the suite was started."""
    with default_interrupt():
        return subprocess.Popen(command, text=True, **options)
