"""The hand-over files of a job: what each window left for later ones.

File number k holds what window k-1 left: the given latents of window k, or the latents of a block of a
block-causal video. There a window starts from several of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from omniavatar.errors import ResumeError
from omniavatar.sampling.causal import CausalWindow

REMEDY = "use --no-resume to start over"
KEPT = 16
"""Windows that a damaged job can go back by."""


class HandOvers(Protocol):
    """Which hand-over files a window starts from, and which are kept."""

    def needed(self, window: int) -> Sequence[int]:
        """Numbers of the files that window number `window`, above 0, starts from."""
        ...

    def outdated(self, done: int) -> int | None:
        """Number of the file that goes when `done` windows are done; None if all stay."""
        ...


class WindowHandOvers:
    """A window starts from one file. The last `KEPT` stay, and every 16th of those before."""

    def needed(self, window: int) -> Sequence[int]:
        return (window,)

    def outdated(self, done: int) -> int | None:
        old = done - KEPT
        return old if old > 0 and old % KEPT else None


@dataclass(frozen=True)
class BlockHandOvers:
    """A block starts from all earlier blocks that decide its cache and its decoder's state, and from the sink.

    - layers: of the DiT.
    - decoded: earlier blocks on which the pixels of a block depend.
    """

    window: CausalWindow
    layers: int
    decoded: int

    def needed(self, window: int) -> Sequence[int]:
        shown = range(max(0, window - self.decoded), window)
        return sorted({block + 1 for block in (*self.window.deciding(window, self.layers), *shown)})

    def outdated(self, done: int) -> int | None:
        reach = max(self.window.rolling * self.layers, self.decoded)
        old = done - reach - KEPT
        return old if old > self.window.sink // self.window.block else None


def load_given(path: Path, shape: Sequence[int]) -> Tensor:
    """The given latents in `path`: float32, finite, of `shape` (1, 16, G, h, w).

    Raises ResumeError if they are missing, damaged, or not such latents.
    """
    given = read_given(path)
    if given.dtype != torch.float32 or given.shape != torch.Size(shape):
        raise ResumeError(
            f"{path} holds {str(given.dtype).removeprefix('torch.')} latents of shape {tuple(given.shape)}, "
            f"not float32 of {tuple(shape)}; {REMEDY}"
        )
    return given


def read_given(path: Path) -> Tensor:
    """The given latents in `path`, finite, of any shape and dtype. Raises ResumeError."""
    if not path.is_file():
        raise ResumeError(f"{path} is missing; {REMEDY}")
    try:
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ResumeError(f"{path} is damaged ({error}); {REMEDY}") from None
    given = tensors.get("given")
    if given is None:
        raise ResumeError(f"{path} is damaged (it has no tensor `given`); {REMEDY}")
    if not torch.isfinite(given).all():
        raise ResumeError(f"{path} holds numbers that are not finite; {REMEDY}")
    return given
