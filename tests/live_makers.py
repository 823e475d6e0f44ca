"""A small maker of live blocks: its frames are as bright as the sound they belong to is loud."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from omniavatar.errors import InputError, ResumeError, StoppedError
from omniavatar.live.maker import MODEL_RATE

if TYPE_CHECKING:
    import torch


class LoudnessMaker:
    """Blocks of `block` frames at 25 a second; each frame shows the peak of its sound as its brightness.

    - seconds: to make a block.
    - steps: in which it can be stopped.
    """

    ahead = 2

    def __init__(self, block: int = 4, seconds: float = 0.0, steps: int = 4, size: int = 16) -> None:
        self.fps, self.size, self.frames = Fraction(25), (size, size), block
        self.seconds, self.steps = seconds, steps
        self.prompts: list[str] = []
        self.closed = False
        self.made: list[float] = []
        self.fails: Exception | None = None
        self._sound = np.zeros(0, np.float32)
        self._position = 0

    @property
    def per_frame(self) -> int:
        return MODEL_RATE // 25

    @property
    def missing(self) -> int:
        return max(0, (self.frames + self.ahead) * self.per_frame - len(self._sound))

    def push(self, samples: np.ndarray) -> None:
        self._sound = np.concatenate([self._sound, samples])

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        assert not self.missing, "the sound of a block and its look-ahead must be pushed before"
        if self.fails is not None:
            raise self.fails
        sound = self._sound[: self.frames * self.per_frame]
        self._sound = self._sound[len(sound) :]
        for _ in range(self.steps if self.seconds else 0):
            if stop():
                raise StoppedError("stopped")
            time.sleep(self.seconds / self.steps)
        peaks = np.abs(sound.reshape(self.frames, -1)).max(1)
        self._position += 1
        self.made.append(time.monotonic())
        values = (peaks.clip(0, 1) * 255).astype(np.uint8)
        frames = np.broadcast_to(values[:, None, None, None], (self.frames, *self.size, 3))
        half = self.frames // 2
        yield frames[:half]
        yield frames[half:]

    def set_prompt(self, prompt: str) -> None:
        if "refuse" in prompt:
            raise InputError("prompt: is refused")
        self.prompts.append(prompt)

    def state(self) -> dict[str, torch.Tensor]:
        import torch

        return {"sound": torch.from_numpy(self._sound), "position": torch.tensor(self._position)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        if "position" not in state:
            raise ResumeError("is of another maker")
        self._sound, self._position = state["sound"].numpy(), int(state["position"])

    def close(self) -> None:
        self.closed = True


def tone(seconds: float, rate: int = 16000, level: float = 0.5) -> np.ndarray:
    """A sine of 440 Hz, (n,) float32."""
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def impulse(seconds: float, at: float, rate: int = 16000) -> np.ndarray:
    """Silence with a click of 2 ms, (n,) float32."""
    samples = np.zeros(int(seconds * rate), np.float32)
    samples[int(at * rate) : int((at + 0.002) * rate)] = 0.9
    return samples
