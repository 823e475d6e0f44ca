"""Live blocks from a model that makes overlapping windows: a block is what a window adds.

The first window starts from the portrait, and each later one from the last frames of the one before it, as in
an ordinary video. A window is long, so an answer comes late. Most of these models are slower than real time:
then sound waits, and frames come when they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from omniavatar.encoders.live_audio import LiveAudioEncoder
from omniavatar.engine.memory_inputs import in_files
from omniavatar.engine.prepare import Planned, condition, read_inputs
from omniavatar.engine.shown import left
from omniavatar.errors import ResumeError
from omniavatar.live.endless import check_origin, make_window, origin, read_left
from omniavatar.plan.run import make_plan
from omniavatar.sampling.windows import anchor
from omniavatar.types import AvatarRequest, SamplingParams, Window

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.engine.shown import Shown
    from omniavatar.types import ImageInput

_EARS = "ears."


class WindowedMaker:
    """One endless video in windows, on the models of a pipeline."""

    def __init__(self, pipeline: AvatarPipeline, image: ImageInput, prompt: str, seed: int | None) -> None:
        self._pipeline = pipeline
        models, video = pipeline.models, pipeline.config.video
        self.fps = Fraction(video.fps)
        with in_files(AvatarRequest(prompt, image, sampling=SamplingParams(seed=seed))) as request:
            inputs = read_inputs(models, request, True)
            pipeline.adopt(inputs.shape)
            plan = make_plan(models.config, inputs.shape, video.sample_rate)  # as for a second of sound
            ready = condition(models, Planned(inputs, plan, None, None, Path()))
        self._conditioning, self._sampling = ready.conditioning, ready.window_sampling
        shape = inputs.shape
        self.size = shape.size
        self._length, self._overlap = shape.window_length, shape.overlap
        self._window = partial(live_window, self._length, self._overlap, anchor_every=shape.anchor_every)
        self._ears = LiveAudioEncoder(models.audio_encoder, self.fps)
        self._rows = np.zeros((0, self._ears.width), np.float32)
        self._given: Tensor | None = None
        self._shown: Shown | None = None
        self._done = 0

    @property
    def frames(self) -> int:
        """Frames that the next window adds; the portrait itself is not shown."""
        return self._length - (self._overlap if self._done else 1)

    @property
    def missing(self) -> int:
        """See `BlockMaker.missing`."""
        return self._ears.needed(self.frames)

    def push(self, samples: np.ndarray) -> None:
        """See `BlockMaker.push`."""
        self._ears.push(samples)

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        """See `BlockMaker.make`."""
        new = self._ears.encode(self.frames)[0].cpu().numpy()
        rows = np.concatenate([self._rows, new])
        heard = replace(self._conditioning, audio=rows)
        result = make_window(
            self._pipeline, self._sampling, heard, self._window, self._done, self._given, stop, self._shown
        )
        pieces, self._given, self._shown = result.frames, result.next_given, result.shown
        first = 0 if self._done else 1
        self._rows, self._done = rows[len(rows) - self._overlap :], self._done + 1
        for piece in pieces:
            if len(shown := piece[first:]):
                yield shown
            first = max(0, first - len(piece))

    def set_prompt(self, prompt: str) -> None:
        """See `BlockMaker.set_prompt`."""
        models, given = self._pipeline.models, self._conditioning
        positive, negative = models.prompts.embed((prompt, self._pipeline.config.sampling.negative_prompt))
        self._conditioning = replace(given, text_positive=positive, text_negative=negative)

    def state(self) -> dict[str, Tensor]:
        """See `BlockMaker.state`."""
        values = {_EARS + name: value for name, value in self._ears.state().items()}
        values |= {"rows": torch.from_numpy(self._rows), "done": torch.tensor(self._done)}
        values |= origin(self._sampling, self._conditioning)
        return values | left(self._given, self._shown)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `BlockMaker.restore`."""
        check_origin(state, self._sampling, self._conditioning)
        done, given, shown = read_left(state, self._window, self._conditioning, self.size)
        rows = state.get("rows")
        if rows is None or rows.shape != (self._overlap if done else 0, self._ears.width):
            raise ResumeError("is damaged: it has no audio of its last frames; start a new session")
        try:
            self._ears.restore({k.removeprefix(_EARS): v for k, v in state.items() if k.startswith(_EARS)})
        except KeyError as error:
            raise ResumeError(f"is damaged: it has no {error}; start a new session") from None
        self._rows, self._done, self._given, self._shown = rows.numpy(), done, given, shown

    def close(self) -> None:
        """See `BlockMaker.close`."""
        self._given = None


def live_window(length: int, overlap: int, index: int, anchor_every: int = 0) -> Window:
    """Window `index`. All but the first start at frame 1, because frame f takes audio row f - 1."""
    given = overlap if index else 1
    new = length - (given if index else 0)
    return anchor(Window(index, min(index, 1), length, given, new), anchor_every)
