"""What makers of windows share: one window of an endless video, and whose video a state is of."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, overload

import torch

from omniavatar.errors import ResumeError

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.engine.shown import Shown
    from omniavatar.engine.window_loop import WindowResult, WindowSampling
    from omniavatar.types import Conditioning, Window

_REMEDY = "start a new session"


@dataclass(frozen=True)
class WindowsUntil(Sequence["Window"]):
    """Windows 0 to `end` - 1, each made when it is read, so that no call grows with the video.

    - window_of: the window of a number.
    """

    window_of: Callable[[int], Window]
    end: int

    def __len__(self) -> int:
        return self.end

    @overload
    def __getitem__(self, place: int) -> Window: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Window]: ...
    def __getitem__(self, place: int | slice) -> Window | Sequence[Window]:
        numbers = range(self.end)[place]
        return self.window_of(numbers) if isinstance(numbers, int) else tuple(map(self.window_of, numbers))


def make_window(
    pipeline: AvatarPipeline,
    sampling: WindowSampling,
    conditioning: Conditioning,
    window_of: Callable[[int], Window],
    number: int,
    given: Tensor | None,
    stop: Callable[[], bool],
    shown: Shown | None,
) -> WindowResult:
    """Window `number`, which starts from the latents `given` by the one before it; see `Session.windows`.

    Raises StoppedError.
    """
    windows = WindowsUntil(window_of, number + 2)  # with the next one, for which latents are handed over
    run = pipeline.run_windows(sampling, conditioning, windows, number, given, stop, shown)
    with closing(cast("Generator[WindowResult]", run)) as results:
        return next(results)


def read_left(
    state: Mapping[str, Tensor],
    window_of: Callable[[int], Window],
    conditioning: Conditioning,
    size: tuple[int, int],
) -> tuple[int, Tensor | None, Shown | None]:
    """The number of windows made, and what `engine.shown.left` put into `state`.

    - size: (H, W) of the frames.

    Raises ResumeError where it is damaged.
    """
    from omniavatar.engine.shown import Shown

    done, given, shown = state.get("done"), state.get("given"), Shown.of(state)
    if done is None or done.numel() != 1 or int(done) < 0:
        raise ResumeError(f"is damaged: it has no number of windows; {_REMEDY}")
    if not int(done) or window_of(int(done)).anchored:
        return int(done), None, None
    grid = conditioning.reference_latent.shape
    if given is None or given.dim() != 5 or given.shape[:2] + given.shape[3:] != grid[:2] + grid[3:]:
        raise ResumeError(f"is damaged: it has no given latents of its portrait; {_REMEDY}")
    if given.dtype != torch.float32 or not torch.isfinite(given).all():
        raise ResumeError(f"is damaged: its given latents are no finite float32; {_REMEDY}")
    held = shown.reference is not None or shown.weight is not None
    if problem := shown.problem(size, shown.last is not None, held):
        raise ResumeError(f"is damaged: it has {problem}; {_REMEDY}")
    return int(done), given, shown


def origin(sampling: WindowSampling, conditioning: Conditioning) -> dict[str, Tensor]:
    """The entries of a state that tell whose video it is."""
    return {"seed": torch.tensor(sampling.seed), "reference": conditioning.reference_latent.cpu()}


def check_origin(state: Mapping[str, Tensor], sampling: WindowSampling, conditioning: Conditioning) -> None:
    """Raise ResumeError where `state` is of another video than these make."""
    for name, mine in origin(sampling, conditioning).items():
        if name not in state or not torch.equal(state[name], mine):
            what = "portrait, size or model" if name == "reference" else name
            raise ResumeError(f"was saved with another {what}; give the same one, or start a new session")
