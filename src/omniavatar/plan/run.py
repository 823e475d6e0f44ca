"""What a run will do, known before anything is loaded: the shape of a window, then the whole plan.

A `WindowShape` needs no audio, so memory can be planned as soon as the portrait and the settings are read.
A `RunPlan` is that shape plus the windows that the audio fills. Each is made once for a video. Only
TeaCache's decisions need weights (those of the time embedding); `RunPlan.decided` adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.model.sizes import FRAMES_PER_LATENT
from omniavatar.plan.steps import sampling_schedule
from omniavatar.sampling.chunks import ChunkRule, plan_chunks
from omniavatar.sampling.guidance import Branch, guidance_branches
from omniavatar.sampling.passes import Passes, branch_patterns, count_passes, guided_steps, plan_passes
from omniavatar.sampling.schedule import Schedule
from omniavatar.sampling.step_cache import compute_all
from omniavatar.sampling.windows import anchored, frames_for, plan_blocks, plan_windows, window_length
from omniavatar.types import StepCache, StepPlan, Window

if TYPE_CHECKING:
    from omniavatar.sampling.causal import CausalWindow
    from omniavatar.sampling.sparsity import SparsityPlan

VAE_STRIDE = 8
"""Pixels of a latent pixel's side."""
PATCH = 2
"""Latent pixels of a token's side."""


@dataclass(frozen=True)
class WindowShape:
    """One window of a request.

    - size: (height, width) in pixels.
    - window_length, overlap: in video frames.
    - causal: the window of a block-causal model, whose blocks count as windows (the first one has three
      frames less); None for other models.
    - chunk: of a model that works in chunks, which count as windows; None for other models.
    - tokens: video tokens of one forward.
    - branches: the passes of a guided step.
    - guidance_interval: beginning and end of the guided steps, as fractions of the steps.
    - step_cache: the policy; a step cache keeps residuals on the device.
    - sparsity: which blocks of attention are computed (`plan.sparsity`); None for all.
    - anchor_every: every window of such a number starts from the portrait again; 0 for none.
    """

    size: tuple[int, int]
    has_audio: bool
    window_length: int
    overlap: int
    latent_frames: int
    tokens: int
    schedule: Schedule
    branches: tuple[Branch, ...]
    guidance_interval: tuple[float, float]
    step_cache: StepCache
    causal: CausalWindow | None
    chunk: ChunkRule | None
    sparsity: SparsityPlan | None = field(default=None, kw_only=True)
    anchor_every: int = field(default=0, kw_only=True)

    @property
    def steps(self) -> int:
        return len(self.schedule)

    @property
    def guided(self) -> int:
        """Number of guided steps."""
        return len(guided_steps(self.steps, self.guidance_interval))


@dataclass(frozen=True)
class RunPlan(WindowShape):
    """The whole run of one request: a window's shape, and the windows.

    - frames: of the finished video.
    - padded_audio_frames: rows of audio features, padded to fill the last window.
    - audio_delay_s: delay of the sound by the leading silence, and by the portrait if it is the first frame.
    - step_plan: None while TeaCache's decisions are unknown; then every step counts as computed.
    """

    fps: float
    frames: int
    windows: tuple[Window, ...]
    padded_audio_frames: int
    audio_delay_s: Fraction
    step_plan: StepPlan | None = None

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps

    def decided(self, step_plan: StepPlan) -> RunPlan:
        """This plan, with the decisions of the step cache."""
        return replace(self, step_plan=step_plan)

    @cached_property
    def passes(self) -> Passes:
        """The passes of each step of a window."""
        steps = self.step_plan or compute_all(self.steps)
        return plan_passes(steps, self.branches, self.has_audio, self.guidance_interval)

    @property
    def forwards(self) -> int:
        """Computed forwards of all windows; an upper bound while `step_plan` is None.

        A block of a block-causal video has one more, which writes the cache.
        """
        clean = 0 if self.causal is None else 1
        return (count_passes(self.passes)[0] + clean) * len(self.windows)

    @property
    def forwards_skipped(self) -> int:
        return count_passes(self.passes)[1] * len(self.windows)

    @property
    def kept_share(self) -> float:
        """Mean share of the attention matrix that a computed forward computes."""
        if self.sparsity is None:
            return 1.0
        computed = [sum(each.compute for each in row) for row in self.passes]
        weighted = zip(computed, self.sparsity.step_shares, strict=True)
        return sum(count * share for count, share in weighted) / sum(computed)

    @property
    def branch_patterns(self) -> dict[str, str]:
        """One letter a step, for each branch: C computed, s skipped, - not run."""
        return branch_patterns(self.passes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about the plan, one sentence each."""
        plan = self.step_plan
        notes = [] if plan is None or not plan.source else [f"step cache by constants {plan.source}"]
        notes += () if plan is None else plan.notes
        if plan is None and self.step_cache == "teacache":
            notes.append(
                "TeaCache's decisions need the checkpoint's time embedding; forwards is an upper bound"
            )
        if self.guided < self.steps and len(self.branches) > 1:
            notes.append(
                f"guidance at {self.guided} of {self.steps} steps (guidance_interval); "
                "the others run one pass, without text or audio guidance"
            )
        return tuple(notes)

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON; windows are given by their count."""
        return {
            "size": self.size,
            "fps": self.fps,
            "frames": self.frames,
            "windows": len(self.windows),
            "window_length": self.window_length,
            "overlap": self.overlap,
            "latent_frames": self.latent_frames,
            "tokens": self.tokens,
            "steps": self.steps,
            "step_plan": None if self.step_plan is None else asdict(self.step_plan),
            "branches": [asdict(branch) for branch in self.branches],
            "guided": self.guided,
            "forwards": self.forwards,
            "forwards_skipped": self.forwards_skipped,
            "padded_audio_frames": self.padded_audio_frames,
            "notes": self.notes,
            "branch_patterns": self.branch_patterns if self.step_plan else None,
            "duration_s": self.duration_s,
            "pattern": self.step_plan.pattern if self.step_plan else None,
            **({} if self.causal is None else {"causal": asdict(self.causal)}),
            **({} if self.chunk is None else {"chunk": asdict(self.chunk)}),
            **({} if self.sparsity is None else self._sparse_values(self.sparsity)),
            **({"anchor_every": self.anchor_every} if self.anchor_every else {}),
        }

    def _sparse_values(self, plan: SparsityPlan) -> dict[str, Any]:
        return {"sparsity": {**plan.as_dict(), "kept_share_of_forwards": self.kept_share}}


def window_shape(
    config: PipelineConfig, size: tuple[int, int], has_audio: bool, sampling: SamplingConfig | None = None
) -> WindowShape:
    """The shape of a request's windows.

    - size: (height, width) of the video in pixels.
    - sampling: the request's; None means the configuration's.
    """
    video, sampling = config.video, sampling or config.sampling
    height, width = size
    causal, chunk = sampling.causal, config.family.chunk
    if chunk is not None:
        length, overlap = chunk.frames, chunk.given
    elif causal is None:
        length, overlap = window_length(video.max_tokens, height, width), video.overlap_frame
    else:
        length, overlap = FRAMES_PER_LATENT * causal.block, 0
    latent_frames, stride = (length + 3) // 4, VAE_STRIDE * PATCH
    return WindowShape(
        size=size,
        has_audio=has_audio,
        window_length=length,
        overlap=overlap,
        latent_frames=latent_frames,
        tokens=latent_frames * (height // stride) * (width // stride),
        schedule=sampling_schedule(sampling, config.family.levels),
        branches=guidance_branches(sampling.guidance_scale, sampling.effective_audio_scale, has_audio),
        guidance_interval=sampling.guidance_interval,
        step_cache=sampling.cache_policy,
        causal=causal,
        chunk=chunk,
        anchor_every=video.anchor_every,
    )


def shape_windows(shape: WindowShape, after_portrait: int, begun: int = 0) -> tuple[Window, ...]:
    """The windows of a video with `after_portrait` frames after the portrait, which chunks do not show.

    begun: frames of the finished video that it goes on from.
    """
    if shape.chunk is not None:
        return anchored(plan_chunks(after_portrait, shape.chunk), shape.anchor_every)
    if shape.causal is not None:
        return plan_blocks(after_portrait, shape.causal.block)
    windows = plan_windows(after_portrait, shape.window_length, shape.overlap, begun)
    return anchored(windows, shape.anchor_every)


def audio_rows(shape: WindowShape, windows: Sequence[Window]) -> int:
    """Rows of audio features that fill all `windows`; the portrait, which is the first frame, has none.

    Chunks share no rows.
    """
    if shape.chunk is not None:
        return len(windows) * shape.chunk.rows
    return windows[-1].start + windows[-1].length - 1


def make_plan(
    config: PipelineConfig, shape: WindowShape, audio_samples: int | None, begun: int = 0
) -> RunPlan:
    """The plan of a request whose windows have `shape`.

    - audio_samples: at `sample_rate`, with the leading silence; None for a silent video of `seq_len` frames.
    - begun: frames of the finished video that this one goes on from; they count as its first window.

    Raises ValueError if `audio_samples` contradicts the shape.
    """
    if (audio_samples is not None) != shape.has_audio:
        raise ValueError(f"{audio_samples} samples for windows with has_audio={shape.has_audio}")
    video = config.video
    if audio_samples is None:
        after_portrait = video.seq_len - (shape.chunk is None)
    else:
        after_portrait = frames_for(audio_samples, video.fps, video.sample_rate)
    windows = shape_windows(shape, after_portrait, begun)
    portrait = 0 if shape.chunk is not None else 1
    return RunPlan(
        **vars(shape),
        fps=video.fps,
        frames=after_portrait + portrait,
        windows=windows,
        padded_audio_frames=audio_rows(shape, windows),
        audio_delay_s=Fraction(0 if begun else video.silence_duration_s) + portrait / Fraction(video.fps),
    )


def plan_run(
    config: PipelineConfig,
    size: tuple[int, int],
    audio_samples: int | None,
    step_plan: StepPlan | None = None,
) -> RunPlan:
    """Shape and plan in one call, for commands that plan without making a video."""
    plan = make_plan(config, window_shape(config, size, audio_samples is not None), audio_samples)
    return plan if step_plan is None else plan.decided(step_plan)
