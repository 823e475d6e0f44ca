"""Live blocks from a block-causal model: the newest sound is encoded, and a block of frames is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from omniavatar.encoders.live_audio import LiveAudioEncoder
from omniavatar.errors import InputError, ResumeError, StoppedError
from omniavatar.types import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from omniavatar.engine.pipeline import AvatarPipeline
    from omniavatar.types import ImageInput

_EARS, _VIDEO = "ears.", "video."


class CausalMaker:
    """One endless video on the models of a pipeline with `sampler: causal`."""

    def __init__(self, pipeline: AvatarPipeline, image: ImageInput, prompt: str, seed: int | None) -> None:
        self._video = pipeline.begin_video(image, prompt, SamplingParams(seed=seed))
        self.fps, self.size = Fraction(self._video.fps), self._video.size
        self._ears = LiveAudioEncoder(pipeline.models.audio_encoder, self.fps)

    @property
    def frames(self) -> int:
        """Frames of the next block. The video's first frame, the portrait, has no sound and is not shown."""
        done = self._video.done
        return self._video.frames_of(done) - (not done)

    @property
    def missing(self) -> int:
        """See `BlockMaker.missing`."""
        return self._ears.needed(self.frames)

    def push(self, samples: np.ndarray) -> None:
        """See `BlockMaker.push`."""
        self._ears.push(samples)

    def make(self, stop: Callable[[], bool]) -> Iterator[np.ndarray]:
        """See `BlockMaker.make`."""
        portrait = int(not self._video.done)
        audio = pad(self._ears.encode(self.frames), (0, 0, portrait, 0))

        def before_step(step: int) -> None:
            if stop():
                raise StoppedError(f"the block was stopped before step {step + 1}")

        pieces = self._video.frames(self._video.make(audio, before_step=before_step))
        self._video.arrived()()
        for piece in pieces:
            if len(shown := piece[portrait:]):
                yield shown
            portrait = max(0, portrait - len(piece))

    def set_prompt(self, prompt: str) -> None:
        """See `BlockMaker.set_prompt`."""
        self._video.set_prompt(prompt)

    def state(self) -> dict[str, Tensor]:
        """See `BlockMaker.state`."""
        parts = ((_EARS, self._ears.state()), (_VIDEO, self._video.state()))
        return {prefix + name: value for prefix, part in parts for name, value in part.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `BlockMaker.restore`."""
        try:
            self._video.restore(under(state, _VIDEO))
            self._ears.restore(under(state, _EARS))
        except (InputError, KeyError) as error:
            raise ResumeError(
                f"does not fit ({error}); open it with the same portrait and settings"
            ) from None

    def close(self) -> None:
        """See `BlockMaker.close`."""
        self._video.close()


def under(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
