"""What a run will do, worked out before anything heavy: windows, tokens, steps, passes.

`make_plan` is pure arithmetic over the configuration. Only TeaCache's decisions need weights (those of the
time embedding); until they are known the plan says so instead of guessing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.errors import ConfigError
from omniavatar.sampling.cache_constants import CacheConstants, published_constants
from omniavatar.sampling.guidance import Branch, guidance_branches
from omniavatar.sampling.passes import Passes, branch_patterns, count_passes, guided_steps, plan_passes
from omniavatar.sampling.schedule import Schedule, make_schedule
from omniavatar.sampling.step_cache import compute_all, magcache_plan, relative_changes, teacache_plan
from omniavatar.sampling.windows import frames_for, padded_audio_frames, plan_windows, window_length
from omniavatar.types import StepPlan, Window

if TYPE_CHECKING:
    import numpy as np

VAE_STRIDE = 8
PATCH = 2


@dataclass(frozen=True)
class RunPlan:
    """The whole run of one request.

    size: (height, width) in pixels. frames: of the finished video. tokens: video tokens of one forward.
    step_plan: None while TeaCache's decisions are unknown. branches: passes of a guided step. guided: how
    many steps are guided. passes: what runs at each step of a window. forwards: block-stack passes of all
    windows, skipped ones not counted (an upper bound while step_plan is None).
    """

    size: tuple[int, int]
    fps: float
    frames: int
    windows: tuple[Window, ...]
    window_length: int
    overlap: int
    latent_frames: int
    tokens: int
    steps: int
    step_plan: StepPlan | None
    branches: tuple[Branch, ...]
    guided: int
    passes: Passes
    forwards: int
    forwards_skipped: int
    padded_audio_frames: int
    notes: tuple[str, ...]

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps

    @property
    def branch_patterns(self) -> dict[str, str]:
        """For each branch one letter a step: C computed, s skipped, - not run."""
        return branch_patterns(self.passes)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; windows are given by their count."""
        values = asdict(self)
        del values["passes"]
        values["branch_patterns"] = self.branch_patterns if self.step_plan else None
        values["windows"] = len(self.windows)
        values["duration_s"] = self.duration_s
        values["pattern"] = self.step_plan.pattern if self.step_plan else None
        return values


def sampling_schedule(sampling: SamplingConfig) -> Schedule:
    """Noise levels of the configured steps."""
    return make_schedule(sampling.num_steps, sampling.shift, sampling.timesteps)


def model_scale(configured: str, dim: int) -> str | None:
    """Which model's published cache constants apply: the configured scale, else by width, else None."""
    if configured in ("1.3B", "14B"):
        return configured
    return {1536: "1.3B", 5120: "14B"}.get(dim)


def make_step_plan(
    sampling: SamplingConfig,
    constants: CacheConstants | None,
    modulations: Callable[[], np.ndarray],
    guard: bool = True,
) -> StepPlan:
    """The configured step cache's plan.

    constants: this model's (`calibration_file.find_constants`). modulations: gives the time projections
    (steps, 6, dim) float32 of the schedule; called for TeaCache only. Raises ConfigError when constants for
    this model are neither published nor measured nor configured.
    """
    policy, steps = sampling.cache_policy, sampling.steps
    if policy == "none":
        return compute_all(steps)
    first, last = sampling.cache_protect_first, sampling.cache_protect_last
    if policy == "magcache":
        if constants is None:
            raise ConfigError(
                "step_cache: MagCache ratios are published for 1.3B and 14B only; "
                "measure this model's with `omniavatar calibrate`, or use none"
            )
        plan = magcache_plan(
            steps,
            constants.magnitude_ratios,
            sampling.magcache_thresh,
            sampling.magcache_max_skip,
            sampling.magcache_retention,
            first,
            last,
        )
        known = len(constants.magnitude_ratios)
        stretched = f"; ratios of {known} steps stretched to {steps}" if known != steps else ""
        return replace(plan, source=constants.source + stretched)
    constants = _teacache_constants(sampling, constants)
    distances = relative_changes(modulations())
    plan = teacache_plan(
        distances,
        constants.polynomial,
        sampling.tea_cache_l1_thresh,
        first,
        last,
        guard,
        constants.fitted,
    )
    return replace(plan, source=constants.source)


def _teacache_constants(sampling: SamplingConfig, constants: CacheConstants | None) -> CacheConstants:
    configured = sampling.teacache_coefficients
    if not isinstance(configured, str):
        return CacheConstants("teacache_coefficients of the configuration", (), configured)
    chosen = constants if configured == "auto" else published_constants(configured)
    if chosen is None:
        raise ConfigError(
            "teacache_coefficients: none are published for this model's size; "
            "measure them with `omniavatar calibrate`, give a polynomial, or set tea_cache_l1_thresh=0"
        )
    return chosen


def make_plan(
    config: PipelineConfig,
    audio_samples: int | None,
    size: tuple[int, int],
    sampling: SamplingConfig | None = None,
    step_plan: StepPlan | None = None,
) -> RunPlan:
    """Plan of one request.

    audio_samples: samples at `sample_rate` with the leading silence, None for a silent video of `seq_len`
    frames. size: (height, width) of the video. sampling: the request's (default: the configured one).
    step_plan: where it is known.
    """
    video, sampling = config.video, sampling or config.sampling
    height, width = size
    length = window_length(video.max_tokens, height, width)
    if audio_samples is None:
        after_portrait = video.seq_len - 1
    else:
        after_portrait = frames_for(audio_samples, video.fps, video.sample_rate)
    windows = plan_windows(after_portrait, length, video.overlap_frame)
    branches = guidance_branches(
        sampling.guidance_scale, sampling.effective_audio_scale, has_audio=audio_samples is not None
    )
    notes = list(step_plan.notes if step_plan else ())
    if step_plan and step_plan.source:
        notes.insert(0, f"step cache by constants {step_plan.source}")
    if step_plan is None and sampling.cache_policy == "teacache":
        notes.append("TeaCache's decisions need the checkpoint's time embedding; forwards is an upper bound")
    interval = sampling.guidance_interval
    known = step_plan or compute_all(sampling.steps)
    passes = plan_passes(known, branches, audio_samples is not None, interval)
    computed, skipped = count_passes(passes)
    guided = len(guided_steps(sampling.steps, interval))
    if guided < sampling.steps and len(branches) > 1:
        notes.append(
            f"guidance at {guided} of {sampling.steps} steps (guidance_interval); "
            "the others run one pass, without text or audio guidance"
        )
    latent_frames = (length + 3) // 4
    stride = VAE_STRIDE * PATCH
    return RunPlan(
        size=size,
        fps=video.fps,
        frames=after_portrait + 1,
        windows=windows,
        window_length=length,
        overlap=video.overlap_frame,
        latent_frames=latent_frames,
        tokens=latent_frames * (height // stride) * (width // stride),
        steps=sampling.steps,
        step_plan=step_plan,
        branches=branches,
        guided=guided,
        passes=passes,
        forwards=computed * len(windows),
        forwards_skipped=skipped * len(windows),
        padded_audio_frames=padded_audio_frames(len(windows), length, video.overlap_frame),
        notes=tuple(notes),
    )
