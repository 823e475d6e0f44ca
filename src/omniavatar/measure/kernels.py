"""A kernel trace of one window, taken with torch.profiler during a profiled run.

`KernelTrace` listens to the run's events. It starts with the second window of the first request, because the
first window also warms up, or with the first if it is the only one. It stops at the next window or at the end
of the request. Windows are queued ahead on a GPU, so it waits for the work before and for the window's own.
Waiting and recording slow that window down, so its times in the report are larger.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from omniavatar.engine.events import RequestFinished, WindowStarted
from omniavatar.types import Event


class KernelTrace:
    """Writes the Chrome trace of one window to `path`. window: its number, None until it starts."""

    def __init__(self, path: Path, on_gpu: bool) -> None:
        self.path = path
        self.window: int | None = None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler = profile(activities=activities)
        self._settle: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
        self._running = False
        self._owner = threading.get_ident()

    def __call__(self, event: Event) -> None:
        if threading.get_ident() != self._owner:
            return
        if self._running and isinstance(event, WindowStarted | RequestFinished):
            self.stop()
        elif isinstance(event, WindowStarted) and self.window is None and _chosen(event):
            self.window = event.window
            self._running = True
            self._settle()
            self._profiler.start()

    def stop(self) -> None:
        """Stop recording and write the trace; does nothing when not recording."""
        if self._running:
            self._running = False
            self._settle()
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self.path))


def _chosen(event: WindowStarted) -> bool:
    """Whether this is the second window, or the only one."""
    return event.window == min(1, event.windows - 1)
