"""What a window leaves: its frames on the host, and what the next one starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from omniavatar.device import download

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.types import Window


class WindowResult:
    """One window, queued or finished. Reading `frames` or `next_given` waits for it, in any thread.

    Reading also raises NumbersError if the window's numbers are not finite.

    - latent: (1, 16, T, h, w) float32 on the device.
    - started: host time (`time.perf_counter`) at which the window was queued.
    """

    def __init__(
        self,
        window: Window,
        latent: Tensor,
        frames: list[np.ndarray],
        next_given: Tensor | None,
        wait: Callable[[], None],
        started: float,
        shown: Tensor | None = None,
    ) -> None:
        self.window, self.latent, self.started = window, latent, started
        self._shown = shown
        self._frames, self._next_given, self._wait = frames, next_given, wait

    def wait(self) -> None:
        """Wait for the window. Raises NumbersError."""
        self._wait()

    @property
    def frames(self) -> list[np.ndarray]:
        """The new frames only, as `convert` returned them."""
        self._wait()
        return self._frames

    @property
    def next_given(self) -> Tensor | None:
        """The next window's given latents (1, 16, G, h, w) float32 on the host; None after the last."""
        self._wait()
        return self._next_given

    @property
    def shown(self) -> Tensor | None:
        """The last new frame (1, 3, 1, H, W) uint8 on the host, if the next window is blended with it."""
        self._wait()
        return self._shown


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Convert pixels (1, 3, N, H, W) in [0, 1] to (N, H, W, 3) uint8 on the CPU, rounded, not truncated.

    The copy from a CUDA device is only queued (`device.download`).
    """
    return download((pixels[0].permute(1, 2, 3, 0) * 255.0).round_().to(torch.uint8).contiguous()).numpy()
