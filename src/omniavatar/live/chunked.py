"""Live blocks from a model that works in chunks: a block is the frames that a chunk shows.

A chunk needs its own 1.12 s of sound and hears the 8 s that end with it, so nothing is looked ahead. It makes
the frames that an ordinary video makes from the same sound, within the rounding of the speech encoder, which
takes several chunks at once there.
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

from omniavatar.encoders.chunk_audio import ChunkEars
from omniavatar.engine.memory_inputs import in_files
from omniavatar.engine.prepare import Planned, condition, read_inputs
from omniavatar.engine.shown import left
from omniavatar.errors import InputError, ResumeError
from omniavatar.live.endless import check_origin, make_window, origin, read_left
from omniavatar.plan.run import make_plan
from omniavatar.sampling.windows import anchor
from omniavatar.types import AvatarRequest, SamplingParams, Window

if TYPE_CHECKING:
    from torch import Tensor

    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.engine.shown import Shown
    from omniavatar.sampling.chunks import ChunkRule
    from omniavatar.types import ImageInput


class ChunkedMaker:
    """One endless video in chunks, on the models of a pipeline."""

    def __init__(
        self, pipeline: AvatarPipeline, image: ImageInput, prompt: str, seed: int | None, rule: ChunkRule
    ) -> None:
        self._pipeline, self._rule = pipeline, rule
        models = pipeline.models
        self.fps = Fraction(rule.fps)
        with in_files(AvatarRequest(prompt, image, sampling=SamplingParams(seed=seed))) as request:
            inputs = read_inputs(models, request, True)
            pipeline.adopt(inputs.shape)
            plan = make_plan(models.config, inputs.shape, rule.new * rule.frame_samples)
            ready = condition(models, Planned(inputs, plan, None, None, Path()))
        self._conditioning, self._sampling = ready.conditioning, ready.window_sampling
        self.size = inputs.shape.size
        self._ears = ChunkEars(models.audio_encoder.model, rule)
        self._window = partial(chunk_window, rule, anchor_every=inputs.shape.anchor_every)
        self._heard = np.zeros(rule.buffer_samples, np.float32)
        self._waiting = np.zeros(0, np.float32)
        self._given: Tensor | None = None
        self._shown: Shown | None = None
        self._done = 0

    @property
    def frames(self) -> int:
        """Frames of every block."""
        return self._rule.new

    @property
    def missing(self) -> int:
        """See `BlockMaker.missing`."""
        return max(0, self._samples - len(self._waiting))

    @property
    def _samples(self) -> int:
        """Samples of a block."""
        return self._rule.new * self._rule.frame_samples

    def push(self, samples: np.ndarray) -> None:
        """See `BlockMaker.push`."""
        self._waiting = np.concatenate([self._waiting, samples.astype(np.float32, copy=False)])

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        """See `BlockMaker.make`."""
        new, self._waiting = self._waiting[: self._samples], self._waiting[self._samples :]
        self._heard = np.concatenate([self._heard[len(new) :], new])
        rows = self._ears.encode_buffers(self._heard[None])[0, -self._rule.rows :].cpu().numpy()
        heard = replace(self._conditioning, audio=rows)
        result = make_window(
            self._pipeline, self._sampling, heard, self._window, self._done, self._given, stop, self._shown
        )
        pieces, self._given, self._shown = result.frames, result.next_given, result.shown
        self._done += 1
        yield from pieces

    def set_prompt(self, prompt: str) -> None:
        """See `BlockMaker.set_prompt`."""
        name = self._pipeline.config.family.name
        raise InputError(f"prompt: {name} takes no text, so it cannot be changed; leave it out")

    def state(self) -> dict[str, Tensor]:
        """See `BlockMaker.state`."""
        values: dict[str, Tensor] = {
            "heard": torch.from_numpy(self._heard.copy()),
            "waiting": torch.from_numpy(self._waiting.copy()),
            "done": torch.tensor(self._done),
            **origin(self._sampling, self._conditioning),
        }
        return values | left(self._given, self._shown)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `BlockMaker.restore`."""
        check_origin(state, self._sampling, self._conditioning)
        done, given, shown = read_left(state, self._window, self._conditioning, self.size)
        heard, waiting = state.get("heard"), state.get("waiting")
        if heard is None or waiting is None or heard.shape != self._heard.shape or waiting.dim() != 1:
            raise ResumeError("does not fit; open it with the same portrait and settings")
        self._heard, self._waiting = heard.numpy().copy(), waiting.numpy().copy()
        self._done, self._given, self._shown = done, given, shown

    def close(self) -> None:
        """See `BlockMaker.close`."""
        self._given = None


def chunk_window(rule: ChunkRule, index: int, anchor_every: int = 0) -> Window:
    """Chunk `index`. All begin where the first does, because the features are of one chunk only."""
    given = rule.given if index else 1
    return anchor(Window(index, -rule.given, rule.frames, given, rule.new, rule.given), anchor_every)
