"""Noise that depends only on the request's seed and the window: not on device, batch, or earlier windows.

It is drawn on the CPU with numpy's Philox generator, whose stream is the same on every machine. The initial
noise is drawn first, then the fresh noises of a re-noising sampler, so a window can be repeated alone.

Drawing a million values takes 18 ms, in which the thread that launches the model's kernels would launch
nothing. numpy releases the interpreter lock meanwhile, so another thread draws ahead (`NoiseAhead`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from omniavatar.device import upload


class WindowNoise:
    """Standard normal tensors of one window of one request, float32 on `device`."""

    def __init__(self, seed: int, window: int, shape: tuple[int, ...], device: torch.device) -> None:
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, window))))
        self.shape = shape
        self._device = device
        self._drawn: deque[Future[np.ndarray]] = deque()

    def draw_ahead(self, count: int, pool: ThreadPoolExecutor) -> None:
        """Start to draw the next `count` tensors in the one thread of `pool`; call it before `draw`."""
        self._drawn += [pool.submit(self._values) for _ in range(count)]

    def draw(self) -> Tensor:
        """The next noise tensor of the window."""
        values = self._drawn.popleft().result() if self._drawn else self._values()
        return upload(torch.from_numpy(values), self._device)

    def _values(self) -> np.ndarray:
        return self._generator.standard_normal(self.shape, dtype=np.float32)


class NoiseAhead:
    """The noise of one request's windows. draws: tensors of a window that are drawn before it starts."""

    def __init__(self, seed: int, device: torch.device, draws: int) -> None:
        self._seed, self._device, self._draws = seed, device, draws
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._prepared: dict[int, WindowNoise] = {}

    def prepare(self, window: int, shape: tuple[int, ...]) -> None:
        """Start to draw for `window`, if not started yet."""
        if window not in self._prepared:
            self._prepared[window] = self._begin(window, shape)

    def of(self, window: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        """A function that draws the noises of `window` in order, from the first one at each call."""
        prepared = self._prepared.pop(window, None)
        if prepared is None or prepared.shape != shape:
            prepared = self._begin(window, shape)
        return prepared.draw

    def close(self) -> None:
        """Drop what is drawn ahead and end the thread; a later draw starts from its first value again."""
        self._prepared.clear()
        self._drawing.shutdown(wait=False, cancel_futures=True)
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="noise")

    def _begin(self, window: int, shape: tuple[int, ...]) -> WindowNoise:
        noise = WindowNoise(self._seed, window, shape, self._device)
        noise.draw_ahead(self._draws, self._drawing)
        return noise
