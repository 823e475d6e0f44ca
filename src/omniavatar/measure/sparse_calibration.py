"""`omniavatar calibrate --mode sparse`: measures block masses on a few windows and writes them to a file.

The windows run as in any other run, with every step computed, guidance at every step, and dense attention. A
later run makes its plan from the file. A killed calibration goes on after its last finished window
(`plan.sparse_progress`). Verification runs the first window again with another seed: densely,
by calibrated plans and by windows of several densities.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from omniavatar import __version__
from omniavatar.accel.mass_meter import MassMeter
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.config.sparsity import SPARSE_NAME, SparsityConfig
from omniavatar.device import device_name
from omniavatar.engine.events import Message
from omniavatar.engine.identity import request_identity
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.prepare import Prepared
from omniavatar.engine.recorder import Listener, RunRecorder, stage_seconds
from omniavatar.engine.window_loop import WindowSampling
from omniavatar.errors import ConfigError
from omniavatar.measure.calibrate import calibration_output
from omniavatar.measure.quality import compare
from omniavatar.media.atomic import beside
from omniavatar.media.lease import lease_for
from omniavatar.plan.calibration import measured_schedule, model_identity
from omniavatar.plan.preview import with_family
from omniavatar.plan.sparse_progress import MeasuredWindows, SparseProgress
from omniavatar.plan.sparsity import SparseHeader, is_sparse_file, plan_shape, write_levels
from omniavatar.sampling.sparsity import MassLevels, SparsityPlan, mass_of, window_plan
from omniavatar.types import AvatarRequest, Window

DENSITIES = (0.75, 0.5, 0.35, 0.25)


@dataclass(frozen=True)
class KeptMass:
    """A plan of the measurement.

    - wanted, density: the density that was requested, and that of the plan.
    - mass: share of the softmax that every row keeps at least.
    """

    wanted: float
    density: float
    mass: float


@dataclass(frozen=True)
class VerifiedPlan:
    """The first window by one plan, compared with the same window with dense attention.

    error: relative L2 of the latent. psnr_db: of the decoded frames, None where they are equal.
    seconds: of denoising; dense_seconds: with dense attention.
    """

    attention: str
    density: float
    error: float
    psnr_db: float | None
    ssim: float
    seconds: float
    dense_seconds: float


@dataclass(frozen=True)
class SparseCalibrationRun:
    """A finished calibration. output: the file. seconds: of the whole calibration."""

    output: Path
    header: SparseHeader
    plans: tuple[KeptMass, ...]
    verified: tuple[VerifiedPlan, ...]
    seconds: float


def calibrate_sparse(
    config: PipelineConfig,
    request: AvatarRequest,
    output: Path | None = None,
    windows: int = 2,
    groups: int = 1,
    verify: bool = False,
    listeners: Sequence[Listener] = (),
) -> SparseCalibrationRun:
    """Measure `windows` windows of `request` (fewer where it has fewer) and write the file.

    - output: default `sparse_attention.safetensors` beside the checkpoint.
    - groups: groups of consecutive sparse steps, each of which gets its own plan.

    Raises ConfigError where nothing is sparse, NumbersError for masses that are not finite, OutputError, and
    what `AvatarPipeline` raises.
    """
    started = time.perf_counter()
    steps, dense = config.sampling.steps, config.sparsity.dense_steps(config.sampling.steps)
    if config.sampling.causal is not None:
        raise ConfigError("sampler: causal attends to a cache of earlier blocks, which no plan covers")
    family = with_family(config).family
    if reason := family.refused.get("sparsity.sparse_attention"):
        raise ConfigError(f"sparse_attention: {family.name}: {reason.partition(';')[0]}; nothing to measure")
    if dense >= steps:
        raise ConfigError(
            f"sparse_dense_steps: {dense} of {steps} steps stay dense, so there is nothing to measure; lower "
            "it, or use more steps"
        )
    if not 1 <= groups <= steps - dense:
        raise ConfigError(
            f"--step-groups {groups}: {steps - dense} of {steps} steps are not dense, so use at most "
            f"{steps - dense}; sparse_dense_steps sets how many are"
        )
    path = calibration_output(config, output, SPARSE_NAME, is_sparse_file)
    plain = changed(
        config,
        sampling={"step_cache": "none", "guidance_interval": (0.0, 1.0)},
        sparsity={
            "sparse_attention": "window" if verify else "dense",  # the backend is needed to verify only
            "sparse_density": None,
            "sparse_mass": None,
            "sparse_file": "auto",
        },
    )
    with lease_for(beside(path, ".", path.name, ".lock"), path):
        recorder = RunRecorder(listeners)
        pipeline = AvatarPipeline.from_config(plain, recorder=recorder)
        with pipeline.prepare(request) as ready:
            chosen = ready.plan.windows[:windows]
            progress = SparseProgress(path, _identity(pipeline, ready, dense, groups))
            levels = _measure(pipeline, ready, chosen, dense, groups, progress)
            header = write_levels(path, _header(pipeline, ready, len(chosen), dense), levels.levels)
            plans = tuple(_kept(levels, steps, dense))
            verified: tuple[VerifiedPlan, ...] = ()
            if verify:
                bench = _SparseBench(pipeline, recorder, ready, chosen[0])
                verified = tuple(bench.verify(levels, dense))
            progress.remove()
    return SparseCalibrationRun(path, header, plans, verified, time.perf_counter() - started)


def _measure(
    pipeline: AvatarPipeline,
    ready: Prepared,
    windows: Sequence[Window],
    dense: int,
    groups: int,
    progress: SparseProgress,
) -> MassLevels:
    models = pipeline.models
    models.load_for_windows()
    shape = plan_shape(pipeline.config, ready.plan, models.dit_config)
    meter = MassMeter(models.dit, shape, dense, groups, models.device)
    sampling = replace(ready.window_sampling, sparsity=None)
    done = _finished(pipeline, progress, len(windows))
    first, given = 0, None
    if done is not None:
        meter.restore(done.sums)
        first, given = done.windows, None if done.given is None else torch.from_numpy(done.given)
    generator = pipeline.window_generator(sampling, ready.conditioning, meter.window)
    for result in generator.run(windows, first, given):
        given = result.next_given  # waits, and raises NumbersError
        meter.keep()
        progress.write(
            MeasuredWindows(
                result.window.index + 1, meter.sums, None if given is None else given.contiguous().numpy()
            )
        )
    return meter.levels()


def _finished(pipeline: AvatarPipeline, progress: SparseProgress, windows: int) -> MeasuredWindows | None:
    """What an interrupted calibration measured of the first `windows` windows."""
    done = progress.read()
    if done is None:
        return None
    if isinstance(done, MeasuredWindows) and (
        done.windows > windows or (done.windows < windows and done.given is None)
    ):
        done = f"they are {done.windows} of another number of windows"
    if isinstance(done, str):
        text = f"{progress.path}: the finished windows in it are dropped, because {done}"
        pipeline.models.recorder.event(Message(text))
        return None
    text = f"continuing after window {done.windows} of {windows}, from {progress.path}"
    pipeline.models.recorder.event(Message(text))
    return done


def _identity(pipeline: AvatarPipeline, ready: Prepared, dense: int, groups: int) -> dict[str, str]:
    """What decides the masses: that of a dense run of the request, and what is measured of it."""
    models, config = pipeline.models, pipeline.config
    plain = changed(config, sparsity=SparsityConfig().model_dump())
    inputs = replace(ready.inputs, shape=replace(ready.inputs.shape, sparsity=None))
    shape = plan_shape(config, ready.plan, models.dit_config)
    identity = request_identity(plain, inputs, "none", models.residency.placement, models)
    return {**identity, "measured": f"{shape}, {dense} dense steps, {groups} groups"}


def _header(pipeline: AvatarPipeline, ready: Prepared, windows: int, dense: int) -> SparseHeader:
    models, config, plan = pipeline.models, pipeline.config, ready.plan
    shape = plan_shape(config, plan, models.dit_config)
    return SparseHeader(
        model=model_identity(config.model, models.dit_config),
        schedule=measured_schedule(ready.inputs.sampling),
        grid=shape.grid,
        block=shape.block,
        dense_steps=dense,
        measured={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "windows": windows,
            "size": list(plan.size),
            "seed": ready.inputs.sampling.seed,
            "guidance_scale": ready.inputs.sampling.guidance_scale,
            "device": device_name(models.device),
            "dtype": config.model.dtype,
            "quantize": models.residency.placement.quantize,
            "attention": models.attention_name,
            "omniavatar": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        sha256="",
    )


def _kept(levels: MassLevels, steps: int, dense: int) -> Iterator[KeptMass]:
    for density in DENSITIES:
        cut = levels.cut_of_density(density)
        yield KeptMass(density, levels.plan(steps, dense, cut).kept_share, mass_of(cut))


class _SparseBench:
    """Runs the first window by plans, with another seed than the measurement."""

    def __init__(
        self, pipeline: AvatarPipeline, recorder: RunRecorder, ready: Prepared, window: Window
    ) -> None:
        self._pipeline, self._recorder, self._ready, self._window = pipeline, recorder, ready, window
        sampling = ready.window_sampling
        self._sampling = replace(sampling, seed=sampling.seed + 1, sparsity=None)

    def verify(self, levels: MassLevels, dense_steps: int) -> Iterator[VerifiedPlan]:
        """Calibrated plans and windows of all `DENSITIES` against dense attention."""
        steps, shape = len(self._sampling.schedule), levels.shape
        dense = self._run(self._sampling)
        for density in DENSITIES:
            calibrated = levels.plan(steps, dense_steps, levels.cut_of_density(density))
            yield self._compared(calibrated, dense)
            yield self._compared(window_plan(shape, shape.order, density, range(dense_steps)), dense)

    def _compared(self, plan: SparsityPlan, dense: tuple[torch.Tensor, np.ndarray, float]) -> VerifiedPlan:
        plan = plan.dense_above(self._pipeline.models.sparse_limit)
        latent, frames, seconds = self._run(replace(self._sampling, sparsity=plan))
        error = float((latent - dense[0]).norm() / dense[0].norm())
        quality = compare(frames, dense[1])
        return VerifiedPlan(
            plan.name, plan.kept_share, error, quality.psnr_db, quality.ssim, seconds, dense[2]
        )

    def _run(self, sampling: WindowSampling) -> tuple[torch.Tensor, np.ndarray, float]:
        """Latent, frames (N, H, W, 3) uint8, and seconds of denoising."""
        generator = self._pipeline.window_generator(sampling, self._ready.conditioning)
        before = self._recorder.timings()
        (result,) = generator.run([self._window])
        seconds = stage_seconds(before, self._recorder.timings())["denoise"]
        return result.latent, np.concatenate(result.frames), seconds
