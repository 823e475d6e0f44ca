"""Noise that depends only on the request's seed and the window: not on device, batch, or earlier windows.

It is drawn on the CPU with numpy's Philox generator, whose stream is the same on every machine. The initial
noise is drawn first, then the fresh noises of a re-noising sampler, so a window can be repeated alone.

A block-causal model may have been trained with a *span*: the noise of a latent is then a weighted sum of
independent noises of its own and of the latents before it, so it changes slowly from latent to latent, and
each latent alone is still standard normal (progressive and mixed noise, arXiv 2305.10474). Its first channels
may stay independent from latent to latent, for what happens at once. The noises of earlier windows are drawn
again from their seeds, so a window can still be repeated alone. Only the initial noise has a span: later
noises are fresh, which is what re-noising corrects a sample with.

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

BEFORE_THE_FIRST = 0
"""Marks the seeds of windows before the first one, which lend their noise to it."""


def span_weights(span: int) -> np.ndarray:
    """Weights (span,) float32 of a latent's own noise and those before it: a Hann window of unit norm."""
    window = np.sin(np.pi * np.arange(1, span + 1) / (span + 1)) ** 2
    return (window / np.sqrt(np.square(window).sum())).astype(np.float32)


def stream(seed: int, window: int) -> np.random.Generator:
    """The random numbers of a window; those before window 0 have negative numbers."""
    key = (seed, window) if window >= 0 else (seed, BEFORE_THE_FIRST, -window)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class WindowNoise:
    """Standard normal tensors of one window of one request, float32 on `device`."""

    def __init__(self, seed: int, window: int, shape: tuple[int, ...], device: torch.device) -> None:
        self._generator = stream(seed, window)
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


class SpanNoise(WindowNoise):
    """Noise whose first tensor of a window, (B, C, T, h, w), goes on smoothly from the window before.

    All windows have as many latents T, and none is given to two windows.

    white: channels, from the first, that stay independent.
    """

    def __init__(
        self, seed: int, window: int, shape: tuple[int, ...], device: torch.device, span: int, white: int = 0
    ) -> None:
        super().__init__(seed, window, shape, device)
        self._white = white
        self._weights: np.ndarray | None = span_weights(span)
        earlier = -(-(span - 1) // shape[2])
        self._past = [stream(seed, number) for number in range(window - earlier, window)]

    def _values(self) -> np.ndarray:
        values, weights = super()._values(), self._weights
        if weights is None:
            return values
        self._weights = None
        past = [each.standard_normal(self.shape, dtype=np.float32) for each in self._past]
        whole, first = np.concatenate([*past, values], 2), len(past) * self.shape[2]
        mixed = np.zeros_like(values)
        for age, weight in enumerate(weights):
            mixed += weight * whole[:, :, first - age : first - age + self.shape[2]]
        mixed[:, : self._white] = values[:, : self._white]
        return mixed


class NoiseAhead:
    """The noise of one request's windows.

    - draws: tensors of a window that are drawn before it starts.
    - span: latents that share noise, see the module; 1 for independent noise.
    - white: channels that have no span.
    """

    def __init__(self, seed: int, device: torch.device, draws: int, span: int = 1, white: int = 0) -> None:
        self._seed, self._device, self._draws, self._span, self._white = seed, device, draws, span, white
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
        if self._span == 1:
            noise = WindowNoise(self._seed, window, shape, self._device)
        else:
            noise = SpanNoise(self._seed, window, shape, self._device, self._span, self._white)
        noise.draw_ahead(self._draws, self._drawing)
        return noise
