"""Makes new clips during training, in a thread; on CUDA it uses its own stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Clips = dict[str, Tensor]


class Supply:
    """Calls `make(count)` in a thread, one call ahead; a context manager that ends the thread."""

    def __init__(self, make: Callable[[int], Clips], count: int, device: torch.device) -> None:
        self._make, self._count, self._cuda = make, count, device.type == "cuda"
        self._device = device
        self._ready: queue.Queue[tuple[Clips, torch.cuda.Event | None] | Exception] = queue.Queue(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Supply:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _stream(self) -> AbstractContextManager[object]:
        if not self._cuda:
            return nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(torch.cuda.Stream(self._device))

    def _work(self) -> None:
        with self._stream():
            while not self._ended.is_set():
                made: tuple[Clips, torch.cuda.Event | None] | Exception
                try:
                    clips = self._make(self._count)
                    event = torch.cuda.Event() if self._cuda else None
                    if event is not None:
                        event.record()
                    made = clips, event
                except Exception as error:
                    made = error
                self._offer(made)
                if isinstance(made, Exception):
                    return

    def _offer(self, made: tuple[Clips, torch.cuda.Event | None] | Exception) -> None:
        while not self._ended.is_set():
            try:
                self._ready.put(made, timeout=0.2)
                return
            except queue.Full:
                continue

    def take(self) -> Clips | None:
        """New clips for the current stream if they are ready, else None. Raises an error of `make`."""
        try:
            made = self._ready.get_nowait()
        except queue.Empty:
            return None
        if isinstance(made, Exception):
            raise made
        clips, event = made
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for value in clips.values():
                value.record_stream(stream)
        return clips
