"""Frozen values that the rooms of the package pass to each other.

Shape letters: B batch, N video frames, T latent frames, H W pixels, h w latent pixels, D audio width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

LocalImage: TypeAlias = "str | Path | np.ndarray | PIL.Image.Image"
LocalAudio: TypeAlias = "str | Path | Waveform"
ImageInput: TypeAlias = "LocalImage | bytes | BinaryIO"
AudioInput: TypeAlias = "LocalAudio | bytes | BinaryIO"
StepCache = Literal["none", "teacache", "magcache"]


def bytes_text(count: float) -> str:
    """`count` bytes in GB (10^9 bytes), below 0.1 GB in MB, to about three digits."""
    value, unit = (count / 1e9, "GB") if count >= 1e8 else (count / 1e6, "MB")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


@dataclass(frozen=True, eq=False)
class Waveform:
    """Audio in memory: `samples` (samples,) or (samples, channels), float in [-1, 1]; sample rate in Hz."""

    samples: np.ndarray
    sample_rate: int


@dataclass(frozen=True)
class SamplingParams:
    """Sampling values of one request; `None` means the configured value."""

    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    audio_scale: float | None = None
    shift: float | None = None
    timesteps: tuple[float, ...] | None = None
    sampler: str | None = None
    negative_prompt: str | None = None
    step_cache: StepCache | None = None
    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class AvatarRequest:
    """One video to make. Without `audio` it is silent and `seq_len` frames long.

    size: (height, width), one of the configuration's; default: the one nearest to the portrait's aspect.
    continues: a finished video of this package; the new one begins with it and goes on with `audio`.
    provenance: whether the finished file gets a signed manifest; `None` means the configured value.
    image: path, content of an image file (bytes or binary file object), PIL image, or array (H, W, 3 or 4)
    uint8.
    audio: path, content of a sound file (bytes or binary file object), or `Waveform`.

    A file object is read once, from its position to its end, by each run.
    """

    prompt: str
    image: ImageInput
    audio: AudioInput | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    size: tuple[int, int] | None = None
    continues: str | Path | None = None
    provenance: bool | None = None


@dataclass(frozen=True)
class Window:
    """One denoising window of a video, counted in video frames; frame 0 of the video is the portrait.

    start: video frame of the window's first frame.
    length: frames of the window (1+4n; 4n for the blocks of a block-causal video after the first one).
    given_frames: leading frames that are known already (1 in window 0, later the overlap).
    new_frames: frames the window adds to the video; the last window is cut at the video's end.
    hidden_frames: leading frames that are decoded, but not shown; None: the given ones, none in window 0.
    anchored: a later window that starts from the portrait, not from what the one before it left.
    """

    index: int
    start: int
    length: int
    given_frames: int
    new_frames: int
    hidden_frames: int | None = None
    anchored: bool = False

    @property
    def latent_frames(self) -> int:
        return (self.length + 3) // 4

    @property
    def given_latents(self) -> int:
        return (3 + self.given_frames) // 4

    @property
    def skipped_frames(self) -> int:
        """Leading frames that the window does not add to the video."""
        if self.hidden_frames is not None:
            return self.hidden_frames
        return 0 if self.index == 0 else self.given_frames

    @property
    def first_new_frame(self) -> int:
        """Video frame of the first frame the window adds (window 0 also adds the portrait frame)."""
        return self.start + self.skipped_frames


@dataclass(frozen=True)
class StepPlan:
    """For each step, whether to run the blocks (True) or reuse the last residual (False).

    source: where the constants of the step cache come from; empty without a step cache.
    """

    compute: tuple[bool, ...]
    policy: str = "none"
    notes: tuple[str, ...] = ()
    source: str = ""

    @property
    def computed(self) -> int:
        return sum(self.compute)

    @property
    def pattern(self) -> str:
        """One letter per step: C computed, s skipped."""
        return "".join("C" if c else "s" for c in self.compute)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The model inputs of a request, made once before the first window.

    text_positive, text_negative: (1, 512, text_dim); (1, 0, 0) for a model without text.
    reference_latent: (1, 16, 1, h, w), normalised; (1, 16, T, h, w) where the model takes the portrait as a
    clip of a window's length.
    audio: (frames, D) float32 array, usually memory-mapped; None for a silent video.
    portrait: (1, 3, 1, H, W) float32 in [-1, 1], to match colours; None if they are not matched.
    """

    text_positive: torch.Tensor
    text_negative: torch.Tensor
    reference_latent: torch.Tensor
    audio: np.ndarray | None
    portrait: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class VideoChunk:
    """Finished frames: `frames` is (N, H, W, 3) uint8 RGB; the first one is video frame `start`."""

    frames: np.ndarray
    start: int
    fps: float
    window: int
    windows: int

    @property
    def times(self) -> np.ndarray:
        """Presentation time of each frame in seconds, (N,)."""
        import numpy as np

        return (self.start + np.arange(len(self.frames))) / self.fps


@dataclass(frozen=True)
class RunResult:
    """Result of one `generate` call. `sidecar` is the path of the JSON file beside the video."""

    output: Path
    sidecar: Path
    frames: int
    windows: int
    resumed_windows: int
    seconds: float


@dataclass(frozen=True)
class Event:
    """Something that happened in a run. kind: its name in JSON lines."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind

    def as_dict(self) -> dict[str, Any]:
        """Its values, JSON-able."""
        return dict(vars(self))


class Recorder(Protocol):
    """Receives the timings of named stages, and events for progress and logs."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time a named stage. Stages nest; times of a repeated name add up."""
        ...

    def event(self, event: Event) -> None:
        """Report something that happened."""
        ...
