"""`omniavatar calibrate --mode sparse`: measures block masses on a few windows and writes them to a file.

The windows run as in any other run, with every step computed, guidance at every step, and dense attention. A
later run makes its plan from the file. Several speakers count equally, however many windows and guidance
branches each has. A killed calibration goes on after its last finished window (`plan.sparse_progress`).
Verification runs the first window again with another seed: densely, by calibrated plans and by windows of
several densities.
"""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from omniavatar.engine.memory_inputs import in_files
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.prepare import Planned, Prepared, condition, plan_request, read_inputs
from omniavatar.engine.recorder import Listener, RunRecorder, stage_seconds
from omniavatar.engine.window_loop import WindowSampling
from omniavatar.errors import ConfigError, InputError
from omniavatar.measure.calibrate import calibration_output
from omniavatar.measure.quality import compare
from omniavatar.media.atomic import beside
from omniavatar.media.lease import lease_for
from omniavatar.media.temporary import temporary_folder
from omniavatar.plan.calibration import measured_schedule, model_identity
from omniavatar.plan.preview import with_family
from omniavatar.plan.sparse_progress import MeasuredWindows, SparseProgress
from omniavatar.plan.sparsity import SparseHeader, is_sparse_file, plan_shape, write_levels
from omniavatar.sampling.sparsity import MassLevels, PlanShape, SparsityPlan, mass_of, window_plan
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
    speakers: AvatarRequest | Sequence[AvatarRequest],
    output: Path | None = None,
    windows: int = 2,
    groups: int = 1,
    verify: bool = False,
    listeners: Sequence[Listener] = (),
) -> SparseCalibrationRun:
    """Measure `windows` windows of each speaker (fewer where one has fewer) and write the file.

    - speakers: their requests, whose windows have one shape and whose settings differ in the seed at most.
    - output: default `sparse_attention.safetensors` beside the checkpoint.
    - groups: groups of consecutive sparse steps, each of which gets its own plan.

    Raises ConfigError where nothing is sparse, InputError for speakers who do not fit together, NumbersError
    for masses that are not finite, OutputError, and what `AvatarPipeline` raises.
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
    requests = (speakers,) if isinstance(speakers, AvatarRequest) else tuple(speakers)
    with lease_for(beside(path, ".", path.name, ".lock"), path), ExitStack() as opened:
        recorder = RunRecorder(listeners)
        pipeline = AvatarPipeline.from_config(plain, recorder=recorder)
        planned = [opened.enter_context(_planned(pipeline, request)) for request in requests]
        found = _Speakers(pipeline, planned, windows)
        progress = SparseProgress(path, _identity(found, dense, groups))
        levels = _measure(found, dense, groups, progress)
        header = write_levels(path, _header(found, dense), levels.levels)
        plans = tuple(_kept(levels, steps, dense))
        verified: tuple[VerifiedPlan, ...] = ()
        if verify:
            bench = _SparseBench(pipeline, recorder, found.ready(0), found.windows[0][0])
            verified = tuple(bench.verify(levels, dense))
        progress.remove()
    return SparseCalibrationRun(path, header, plans, verified, time.perf_counter() - started)


@contextmanager
def _planned(pipeline: AvatarPipeline, request: AvatarRequest) -> Iterator[Planned]:
    """A request with its windows planned, while the body runs."""
    with in_files(request) as local, temporary_folder() as folder:
        yield plan_request(pipeline.models, read_inputs(pipeline.models, local), folder)


class _Speakers:
    """Who is measured. All share one placement of the models. windows: of each, those that are measured."""

    def __init__(self, pipeline: AvatarPipeline, planned: Sequence[Planned], windows: int) -> None:
        self.pipeline, self.planned = pipeline, planned
        self.windows = [each.plan.windows[:windows] for each in planned]
        self._ready: dict[int, Prepared] = {}
        for number in range(1, len(planned)):
            self._check_alike(number)
        shapes = [each.inputs.shape for each in planned]
        pipeline.adopt(max(shapes, key=lambda shape: (len(shape.branches), shape.has_audio)))

    @property
    def shape(self) -> PlanShape:
        """What a plan for their windows is for."""
        return self._shape_of(self.planned[0])

    def ready(self, number: int) -> Prepared:
        """The speaker with a number, from 0, ready for the windows. The first and the last used are kept."""
        if number not in self._ready:
            self._ready = {kept: each for kept, each in self._ready.items() if kept == 0}
            self._ready[number] = condition(self.pipeline.models, self.planned[number])
        return self._ready[number]

    def name(self, number: int) -> str:
        """`speaker 2 of 3`, and the portrait's file if it has one."""
        image = self.planned[number].inputs.request.image
        file = f" ({image})" if isinstance(image, str | Path) else ""
        return f"speaker {number + 1} of {len(self.planned)}{file}"

    def measured_passes(self, number: int, dense: int) -> int:
        """Forward passes of a speaker whose masses are measured."""
        passes = self.planned[number].plan.passes
        return len(self.windows[number]) * sum(len(step) for step in passes[dense:])

    def _check_alike(self, number: int) -> None:
        """Raise InputError if a file of the first one's masses could not hold another one's."""
        first, other = self.planned[0], self.planned[number]
        then, now = (" x ".join(map(str, self._shape_of(each).grid)) for each in (first, other))
        if then != now:
            raise InputError(
                f"{self.name(number)}: has windows of {now} latent frames x rows x columns of tokens, the "
                f"first speaker {then}; give portraits of one shape, or keep one size in image_sizes_720"
            )
        settings = [each.inputs.sampling.model_dump(exclude={"seed"}) for each in (first, other)]
        for name, value in settings[0].items():
            if settings[1][name] != value:
                raise InputError(
                    f"{self.name(number)}: {name} is {settings[1][name]}, the first speaker's is {value}; "
                    "only the seed may differ"
                )

    def _shape_of(self, planned: Planned) -> PlanShape:
        return plan_shape(self.pipeline.config, planned.plan, self.pipeline.models.dit_config)


def _measure(speakers: _Speakers, dense: int, groups: int, progress: SparseProgress) -> MassLevels:
    models, count = speakers.pipeline.models, len(speakers.planned)
    done = _finished(speakers, progress)
    begun = 0 if done is None else done.speaker
    speakers.ready(begun)  # the encoders run before the DiT is loaded
    models.load_for_windows()
    meter = MassMeter(models.dit, speakers.shape, dense, groups, models.device)
    earlier = None if done is None else done.earlier
    for number in range(begun, count):
        if number > begun or done is None:
            done = MeasuredWindows(0, np.zeros_like(meter.sums), None)
        meter.restore(done.sums)
        if count > 1:
            windows = len(speakers.windows[number])
            text = f"{speakers.name(number)}: {windows} window{'s' if windows > 1 else ''}"
            models.recorder.event(Message(text))
        for after in _windows_after(speakers, number, meter, done):
            progress.write(replace(after, speaker=number, earlier=earlier))
        if count > 1:
            mean = meter.sums / np.float32(speakers.measured_passes(number, dense))
            earlier = mean if earlier is None else earlier + mean
    if earlier is not None:
        meter.restore(earlier)
    return meter.levels()


def _windows_after(
    speakers: _Speakers, number: int, meter: MassMeter, done: MeasuredWindows
) -> Iterator[MeasuredWindows]:
    """Measure the windows of a speaker that are not `done`; yields what is known after each."""
    windows = speakers.windows[number]
    if done.windows == len(windows):
        return
    ready = speakers.ready(number)
    sampling = replace(ready.window_sampling, sparsity=None)
    given = None if done.given is None else torch.from_numpy(done.given)
    generator = speakers.pipeline.window_generator(sampling, ready.conditioning, meter.window)
    for result in generator.run(windows, done.windows, given):
        given = result.next_given  # waits, and raises NumbersError
        meter.keep()
        start = None if given is None else given.contiguous().numpy()
        yield MeasuredWindows(result.window.index + 1, meter.sums, start)


def _finished(speakers: _Speakers, progress: SparseProgress) -> MeasuredWindows | None:
    """What an interrupted calibration measured of these windows."""
    done = progress.read()
    if done is None:
        return None
    if isinstance(done, MeasuredWindows):
        windows = len(speakers.windows[done.speaker]) if done.speaker < len(speakers.windows) else 0
        if done.windows > windows or (done.windows < windows and done.given is None):
            done = f"they are {done.windows} of another number of windows"
    recorder = speakers.pipeline.models.recorder
    if isinstance(done, str):
        text = f"{progress.path}: the finished windows in it are dropped, because {done}"
        recorder.event(Message(text))
        return None
    whose = f" of {speakers.name(done.speaker)}" if len(speakers.planned) > 1 else ""
    recorder.event(
        Message(f"continuing after window {done.windows} of {windows}{whose}, from {progress.path}")
    )
    return done


def _identity(speakers: _Speakers, dense: int, groups: int) -> dict[str, Any]:
    """What decides the masses: that of a dense run of each request, and what is measured of it."""
    pipeline = speakers.pipeline
    models, placement = pipeline.models, pipeline.models.residency.placement
    plain = changed(pipeline.config, sparsity=SparsityConfig().model_dump())
    found = []
    for each in speakers.planned:
        inputs = replace(each.inputs, shape=replace(each.inputs.shape, sparsity=None))
        found.append(request_identity(plain, inputs, "none", placement, models))
    measured = f"{speakers.shape}, {dense} dense steps, {groups} groups"
    if len(found) == 1:
        return {**found[0], "measured": measured}
    return {"speakers": found, "windows": [len(each) for each in speakers.windows], "measured": measured}


def _header(speakers: _Speakers, dense: int) -> SparseHeader:
    models, config, ready = speakers.pipeline.models, speakers.pipeline.config, speakers.planned[0]
    shape, count = speakers.shape, len(speakers.planned)
    seeds = list(dict.fromkeys(each.inputs.sampling.seed for each in speakers.planned))
    return SparseHeader(
        model=model_identity(config.model, models.dit_config),
        schedule=measured_schedule(ready.inputs.sampling),
        grid=shape.grid,
        block=shape.block,
        dense_steps=dense,
        measured={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "windows": sum(map(len, speakers.windows)),
            **({"speakers": count} if count > 1 else {}),
            "size": list(ready.plan.size),
            "seed": seeds[0] if len(seeds) == 1 else seeds,
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
        plan = plan.dense_above(self._pipeline.models.sparse_limit(plan.shape.tokens))
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
