"""One calibration: runs a few windows with every step computed, and fits the step cache's constants.

The windows run as in any other run, but guided at every step, because a branch that pauses has no step before
to compare with, and with `accel.residual_meter` around the block stack. Verification runs the first window
once more with every step, for its time, and once by each plan.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from omniavatar import __version__
from omniavatar.accel.residual_meter import ResidualMeter
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.device import device_name
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.prepare import Prepared
from omniavatar.engine.recorder import Listener, RunRecorder, stage_seconds
from omniavatar.errors import ConfigError, OutputError, TargetError
from omniavatar.measure.quality import compare
from omniavatar.media.atomic import atomic_write_json, beside, check_writable
from omniavatar.media.lease import lease_for
from omniavatar.plan.calibration import (
    NAME,
    Calibration,
    MeasuredBranch,
    TeaCache,
    default_path,
    measured_schedule,
    model_identity,
)
from omniavatar.plan.preview import with_family
from omniavatar.plan.steps import make_step_plan, model_scale, sampling_schedule
from omniavatar.sampling.cache_constants import CacheConstants, published_constants
from omniavatar.sampling.calibration import (
    ResidualChanges,
    estimated_error,
    fit_teacache,
    shared_ratios,
)
from omniavatar.sampling.step_cache import compute_all, relative_changes
from omniavatar.types import AvatarRequest, StepPlan, Window

TEACACHE_THRESHOLDS = (0.05, 0.1, 0.14, 0.2, 0.3)
MAGCACHE_THRESHOLDS = (0.06, 0.12, 0.24)


@dataclass(frozen=True)
class Trial:
    """One policy at one threshold with the measured constants. error: `calibration.estimated_error`.

    notes: those of the plan.
    """

    policy: str
    threshold: float
    pattern: str
    computed: int
    error: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    """The first window by one plan, compared with the same window with every step computed.

    error: relative L2 of the latent. psnr_db: of the decoded frames, None where they are equal.
    seconds: of denoising; full_seconds: with every step.
    """

    constants: str
    policy: str
    threshold: float
    pattern: str
    computed: int
    error: float
    psnr_db: float | None
    seconds: float
    full_seconds: float


@dataclass(frozen=True)
class CalibrationRun:
    """A finished calibration. output: the file. seconds: of the whole calibration."""

    output: Path
    calibration: Calibration
    trials: tuple[Trial, ...]
    verified: tuple[Verified, ...]
    seconds: float


def calibration_output(
    config: PipelineConfig,
    output: Path | None,
    name: str = NAME,
    replaceable: Callable[[Path], bool] | None = None,
) -> Path:
    """The file to write; its folder exists and is writable. Raises ConfigError, OutputError, TargetError.

    - name: the default name, which no other program uses.
    - replaceable: whether a file of another name may be written over.
    """
    path = output or default_path(config.model, name)
    if path is None:
        raise ConfigError("--output: random weights have no folder; name the file to write")
    if output is None and not path.parent.is_dir():
        raise ConfigError(f"exp_path: {path.parent} does not exist; correct it")
    try:
        check_writable(path.absolute().parent)
    except OutputError as error:
        raise OutputError(f"{error}, or name another file with --output") from None
    if path.name != name and not (replaceable or _replaceable)(path):
        kind = "constants" if name == NAME else "block masses"
        raise TargetError(f"{path}: is not a file of {kind}; move it away or name another with --output")
    return path


def _replaceable(path: Path) -> bool:
    """Whether `path` is missing, empty, or a file that a calibration wrote."""
    if not path.exists():
        return True
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if text else {"schedule": None, "teacache": None}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and {"schedule", "teacache"} <= set(values)


def calibrate(
    config: PipelineConfig,
    request: AvatarRequest,
    output: Path | None = None,
    windows: int = 2,
    verify: bool = False,
    listeners: Sequence[Listener] = (),
) -> CalibrationRun:
    """Measure `windows` windows of `request` (fewer where it has fewer) and write the constants.

    output: default `step_cache.json` beside the checkpoint.

    Raises ConfigError for fewer than two steps, OutputError, and what `AvatarPipeline` raises.
    """
    started = time.perf_counter()
    if config.sampling.causal is not None:
        raise ConfigError("sampler: causal computes every step, so there is no step cache to calibrate")
    family = with_family(config).family
    if reason := family.refused.get("sampling.step_cache"):
        raise ConfigError(
            f"{family.name}: {reason.partition(';')[0]}, so there is no step cache to calibrate"
        )
    if config.sampling.steps < 2:
        raise ConfigError("num_steps: calibration compares steps with each other; use at least 2")
    path = calibration_output(config, output)
    with lease_for(beside(path, ".", path.name, ".lock"), path):
        return _calibrate(config, request, path, windows, verify, listeners, started)


def _calibrate(
    config: PipelineConfig,
    request: AvatarRequest,
    path: Path,
    windows: int,
    verify: bool,
    listeners: Sequence[Listener],
    started: float,
) -> CalibrationRun:
    recorder = RunRecorder(listeners)
    plain = changed(config, sampling={"step_cache": "none", "guidance_interval": (0.0, 1.0)})
    pipeline = AvatarPipeline.from_config(plain, recorder=recorder)
    with pipeline.prepare(request) as ready:
        chosen = ready.plan.windows[:windows]
        meter = ResidualMeter()
        sampling = ready.window_sampling
        generator = pipeline.window_generator(sampling, ready.conditioning, meter.window)
        for result in generator.run(chosen):
            result.wait()
            meter.keep()
        changes = meter.changes()
        distances = relative_changes(pipeline.models.time_projections(ready.plan.schedule.timesteps))
        calibration = _calibration(pipeline, ready, len(chosen), changes, distances)
        atomic_write_json(path, calibration.model_dump(mode="json"))
        bench = _Bench(pipeline, recorder, config.sampling, ready, changes)
        trials = bench.trials(calibration.constants("measured"))
        verified: tuple[Verified, ...] = ()
        if verify:
            verified = tuple(bench.verify(chosen[0], calibration.constants("measured")))
    return CalibrationRun(path, calibration, trials, verified, time.perf_counter() - started)


def _calibration(
    pipeline: AvatarPipeline,
    ready: Prepared,
    windows: int,
    changes: dict[str, ResidualChanges],
    distances: np.ndarray,
) -> Calibration:
    models, config = pipeline.models, pipeline.config
    time_changes = tuple(float(d) for d in distances)
    fit = fit_teacache(time_changes, changes)
    plan = ready.plan
    return Calibration(
        model=model_identity(config.model, models.dit_config),
        schedule=measured_schedule(ready.inputs.sampling),
        measured={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "windows": windows,
            "size": list(plan.size),
            "window_length": plan.window_length,
            "tokens": plan.tokens,
            "seed": ready.inputs.sampling.seed,
            "guidance_scale": ready.inputs.sampling.guidance_scale,
            "audio_scale": ready.inputs.sampling.effective_audio_scale,
            "device": device_name(models.device),
            "dtype": config.model.dtype,
            "quantize": models.residency.placement.quantize,
            "attention": models.attention_name,
            "omniavatar": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        time_changes=time_changes,
        branches={name: MeasuredBranch(**asdict(each)) for name, each in changes.items()},
        magnitude_ratios=shared_ratios(changes),
        teacache=TeaCache(**asdict(fit)),
    )


class _Bench:
    """Plans from measured constants: estimates them, and runs them."""

    def __init__(
        self,
        pipeline: AvatarPipeline,
        recorder: RunRecorder,
        sampling: SamplingConfig,
        ready: Prepared,
        changes: dict[str, ResidualChanges],
    ) -> None:
        self._pipeline, self._recorder = pipeline, recorder
        self._sampling, self._ready, self._changes = sampling, ready, changes

    def trials(self, constants: CacheConstants) -> tuple[Trial, ...]:
        """Estimates for both policies at several thresholds."""
        rows = [("teacache", threshold) for threshold in TEACACHE_THRESHOLDS]
        rows += [("magcache", threshold) for threshold in MAGCACHE_THRESHOLDS]
        schedule = sampling_schedule(self._sampling)
        found = []
        for policy, threshold in rows:
            plan = self._plan(policy, threshold, constants)
            error = estimated_error(plan, self._changes, schedule)
            found.append(Trial(policy, threshold, plan.pattern, plan.computed, error, plan.notes))
        return tuple(found)

    def verify(self, window: Window, measured: CacheConstants) -> list[Verified]:
        """Run the configured policy (default: MagCache) with measured and with published constants."""
        sampling = self._sampling
        policy = "teacache" if sampling.cache_policy == "teacache" else "magcache"
        threshold = sampling.tea_cache_l1_thresh if policy == "teacache" else sampling.magcache_thresh
        config = self._pipeline.config
        scale = model_scale(config.model.scale, self._pipeline.models.dit_config.dim)
        sources = {"measured": measured, "published": published_constants(scale)}
        full = self._run(compute_all(sampling.steps), window)
        rows = []
        for name, constants in sources.items():
            if constants is None:
                continue
            plan = self._plan(policy, threshold, constants)
            latent, frames, seconds = self._run(plan, window)
            error = (latent - full[0]).norm() / full[0].norm()
            psnr = compare(frames, full[1]).psnr_db
            rows.append(
                Verified(
                    name,
                    policy,
                    threshold,
                    plan.pattern,
                    plan.computed,
                    float(error),
                    psnr,
                    seconds,
                    full[2],
                )
            )
        return rows

    def _plan(self, policy: str, threshold: float, constants: CacheConstants) -> StepPlan:
        key = "tea_cache_l1_thresh" if policy == "teacache" else "magcache_thresh"
        changes = {"step_cache": policy, key: threshold, "teacache_coefficients": "auto"}
        sampling = self._sampling.model_copy(update=changes)
        timesteps = sampling_schedule(sampling).timesteps
        return make_step_plan(sampling, constants, lambda: self._pipeline.models.time_projections(timesteps))

    def _run(self, plan: StepPlan, window: Window) -> tuple[torch.Tensor, np.ndarray, float]:
        """Latent, frames (N, H, W, 3) uint8, and seconds of denoising."""
        sampling = self._ready.decided(plan).window_sampling
        generator = self._pipeline.window_generator(sampling, self._ready.conditioning)
        before = self._recorder.timings()
        (result,) = generator.run([window])
        seconds = stage_seconds(before, self._recorder.timings())["denoise"]
        return result.latent, np.concatenate(result.frames), seconds
