"""The hand-over files of a job: what each window left for later ones.

File number k holds what window k-1 left: the given latents of window k, or the latents of a block of a
block-causal video. There a window starts from several of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from omniavatar.engine.shown import Shown
from omniavatar.errors import ResumeError

REMEDY = "use --no-resume to start over"


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


def load_shown(path: Path, size: tuple[int, int], last: bool, held: bool) -> Shown:
    """What the pictures of the window before left; arguments as of `Shown.problem`. Raises ResumeError."""
    shown = Shown.of(_tensors(path))
    if problem := shown.problem(size, last, held):
        raise ResumeError(f"{path} has {problem}; {REMEDY}")
    return shown


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ResumeError(f"{path} is missing; {REMEDY}")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ResumeError(f"{path} is damaged ({error}); {REMEDY}") from None


def read_given(path: Path) -> Tensor:
    """The given latents in `path`, finite, of any shape and dtype. Raises ResumeError."""
    given = _tensors(path).get("given")
    if given is None:
        raise ResumeError(f"{path} is damaged (it has no tensor `given`); {REMEDY}")
    if not torch.isfinite(given).all():
        raise ResumeError(f"{path} holds numbers that are not finite; {REMEDY}")
    return given
