"""The main path: request -> conditioning -> windows -> denoise -> decode -> write.

`AvatarPipeline` serves many requests with models loaded once. `stream` hands out frames as windows finish;
`generate` writes a video that grows on disk, survives a crash and gets its final name when it is whole.
A request's result depends on its inputs, its seed and the configuration alone, not on what ran before.
Of several processes that make one video the first runs this, the others `omniavatar.engine.following`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniavatar.accel.residual_cache import PassRunner, ResidualCache
from omniavatar.config.change import effective_sampling
from omniavatar.config.identity import flat_values
from omniavatar.config.load import Overrides, load_config
from omniavatar.config.schema import PipelineConfig, SamplingConfig
from omniavatar.device import device_name
from omniavatar.encoders.image import choose_bucket, prepare_image
from omniavatar.engine.clocks import DeviceClock
from omniavatar.engine.conditioning import Sound, make_conditioning
from omniavatar.engine.identity import request_fingerprint
from omniavatar.engine.job import Job, checked_output, fingerprint, load_given
from omniavatar.engine.models import Components
from omniavatar.engine.orders import PlaceOrder, WindowsOrder
from omniavatar.engine.recorder import RunRecorder, stage_seconds
from omniavatar.engine.retry import MakeRoom, no_room, with_room
from omniavatar.engine.sidecar import peak_memory, write_sidecar
from omniavatar.engine.window_loop import WindowGenerator, WindowResult, WindowSampling
from omniavatar.engine.writer import VideoWriter
from omniavatar.errors import InputError
from omniavatar.media.audio import decode_mono
from omniavatar.media.encoders import Encoder, choose_encoder
from omniavatar.media.image import load_image
from omniavatar.model.dit import RunBlocks
from omniavatar.parallel.team import ONE, Team, check_size
from omniavatar.plan.placement import PASS_FIELD, QUANTIZE_FIELD, Placement
from omniavatar.plan.run import RunPlan, make_plan, sampling_schedule
from omniavatar.plan.sizes import Request
from omniavatar.sampling.cache_constants import CacheConstants
from omniavatar.sampling.guidance import guidance_branches
from omniavatar.types import AvatarRequest, Conditioning, RunResult, StepPlan, VideoChunk, Window


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A request whose inputs are read; nothing heavy has happened yet."""

    request: AvatarRequest
    sampling: SamplingConfig
    image: np.ndarray
    size: tuple[int, int]
    constants: CacheConstants | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that is ready to denoise: what is sampled, its windows, what they are conditioned on.

    constants: those of the configured step cache, None without one.
    """

    sampling: SamplingConfig
    plan: RunPlan
    conditioning: Conditioning
    constants: CacheConstants | None


class AvatarPipeline:
    """One portrait, one voice, one prompt -> a talking-avatar video, as often as asked."""

    def __init__(self, config: PipelineConfig, recorder: RunRecorder | None = None, team: Team = ONE) -> None:
        check_size(team, config.runtime.processes)
        self.config, self.team = config, team
        self._recorder = recorder or RunRecorder()
        self._encoders: dict[tuple[int, int], Encoder] = {}
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        self.components = Components(config, self._recorder, team)

    @classmethod
    def from_config(
        cls,
        config: str | Path | PipelineConfig,
        overrides: Overrides = (),
        recorder: RunRecorder | None = None,
        team: Team = ONE,
    ) -> AvatarPipeline:
        """A pipeline from a YAML file (with `--hp` style overrides) or a ready configuration.

        Weight files are checked by their headers now and loaded at the first request.
        Raises ConfigError, CheckpointError, ResourceError.
        """
        if not isinstance(config, PipelineConfig):
            config = load_config(config, overrides).config
        return cls(config, recorder, team)

    def stream(self, request: AvatarRequest) -> Iterator[VideoChunk]:
        """Yield the frames of each window as it finishes; nothing stays on disk."""
        with self.prepare(request) as ready:
            make_room = self.components.make_room
            step_plan = with_room(partial(self._step_plan, ready.sampling, ready.constants), make_room)
            for result in self._windows(ready.sampling, ready.conditioning, step_plan, ready.plan.windows):
                yield VideoChunk(
                    np.concatenate(result.frames),
                    result.window.first_new_frame,
                    ready.plan.fps,
                    result.window.index,
                    len(ready.plan.windows),
                )

    @contextmanager
    def prepare(self, request: AvatarRequest) -> Iterator[Prepared]:
        """Read and encode the request's inputs, for as long as the body runs; the caller runs its windows."""
        self._use_device_clock()
        inputs = self._read(request)
        self._adopt(inputs, self._place(inputs, {}))
        with tempfile.TemporaryDirectory(prefix="omniavatar-") as folder:
            waveform, plan = self._plan(inputs, Path(folder) / "audio.f32")
            condition = partial(self._condition, inputs, plan, waveform, Path(folder) / "audio_features.npy")
            conditioning = with_room(condition, self.components.make_room)
            yield Prepared(inputs.sampling, plan, conditioning, inputs.constants)

    def window_generator(
        self,
        sampling: SamplingConfig,
        conditioning: Conditioning,
        step_plan: StepPlan,
        make_cache: Callable[[RunBlocks], PassRunner] = ResidualCache,
        make_room: MakeRoom | None = None,
    ) -> WindowGenerator:
        """What denoises and decodes the windows of a prepared request by `step_plan`.

        make_room: for too little memory, `Components.make_room` if None; an error with several processes.
        """
        branches = guidance_branches(
            sampling.guidance_scale, sampling.effective_audio_scale, conditioning.audio is not None
        )
        windows = WindowSampling(
            sampling.seed,
            sampling_schedule(sampling),
            step_plan,
            branches,
            sampling.sampler,
            sampling.guidance_interval,
        )
        components = self.components
        make_room = no_room if self.team.size > 1 else make_room or components.make_room

        def generator() -> WindowGenerator:
            return WindowGenerator(
                components.dit,
                components.window_vae,
                conditioning,
                windows,
                self._recorder,
                make_cache=make_cache,
                make_room=make_room,
                team=self.team,
                run_blocks=components.run_blocks,
            )

        return with_room(generator, make_room)

    def generate(
        self, request: AvatarRequest, output: str | Path, resume: bool | None = None, index: int = 0
    ) -> RunResult:
        """Write the request's video to `output` (.mp4) and a JSON sidecar beside it.

        An interrupted run of the same request continues after its last finished window, and a finished one
        is left as it is, unless `resume` is False (default: the configuration's). `index` numbers the request
        in events. Raises InputError, OutputError, ResumeError, CheckpointError, ResourceError.
        """
        job = Job(checked_output(Path(output)))
        resume = self.config.output.resume if resume is None else resume
        inputs = self._read(request)
        encoder = self._choose_encoder(inputs.size)
        placement = self._place(inputs, job.recorded(QUANTIZE_FIELD, PASS_FIELD) if resume else {})
        identity = request_fingerprint(
            self.config,
            inputs.sampling,
            request,
            inputs.image,
            inputs.constants,
            encoder,
            placement,
            self.components.attention_name,
        )
        before = job.finished_before(identity) if resume else None
        if before is not None:
            self._message(f"{job.output} is finished already; use --no-resume to make it again")
            return RunResult(
                job.output, job.sidecar, before["frames"], before["windows"], before["windows"], 0.0
            )
        done = job.open(identity, resume)
        try:
            self._adopt(inputs, placement)
            return self._generate(inputs, encoder, job, done, index)
        finally:
            if not job.done:
                job.discard()

    def _generate(self, inputs: _Inputs, encoder: Encoder, job: Job, done: int, index: int) -> RunResult:
        self._use_device_clock()
        started = time.perf_counter()
        timings_before = self._recorder.timings()
        config = self.config
        waveform, plan = self._plan(inputs, job.waveform_path)
        self._recorder.event(
            "request_started",
            index=index,
            name=job.output.name,
            frames=plan.frames,
            windows=len(plan.windows),
            steps=plan.steps,
            resumed_windows=done,
        )
        if done:
            self._message(f"resuming {job.output.name} at window {done + 1} of {len(plan.windows)}")
        delay = Fraction(config.video.silence_duration_s) + Fraction(1) / Fraction(plan.fps)
        step_plan: StepPlan | None = None
        audio = inputs.request.audio

        def make_room(reason: str) -> None:
            self.components.make_room(reason)
            job.amend(fingerprint(self.components.placed.identity()))

        with VideoWriter(job, plan, config.output, audio, delay, self._recorder, encoder) as writer:
            if done < len(plan.windows):
                condition = partial(self._condition, inputs, plan, waveform, job.features_path)
                conditioning = with_room(condition, make_room)
                step_plan = with_room(partial(self._step_plan, inputs.sampling, inputs.constants), make_room)
                plan = make_plan(
                    config,
                    None if waveform is None else len(waveform),
                    inputs.size,
                    inputs.sampling,
                    step_plan,
                )
                given = load_given(job.given_path(done)) if done else None
                begun = time.perf_counter()
                for result in self._windows(
                    inputs.sampling, conditioning, step_plan, plan.windows, done, given, make_room
                ):
                    writer.submit(result, begun)
            writer.finish()
        seconds = time.perf_counter() - started
        write_sidecar(
            job,
            {
                "output": job.output.name,
                "bytes": job.output.stat().st_size,
                "prompt": inputs.request.prompt,
                "seed": inputs.sampling.seed,
                "frames": plan.frames,
                "windows": len(plan.windows),
                "resumed_windows": done,
                "seconds": seconds,
                "stages": stage_seconds(timings_before, self._recorder.timings()),
                "plan": plan.as_dict(),
                "device": device_name(self.components.device),
                "processes": self.team.size,
                **peak_memory(self.components.device),
                "attention": self.components.attention_name,
                "vae": self.components.vae_name,
                "decoder": config.model.decoder,
                "encoder": encoder,
                "quantize": self.components.quantize,
                "memory": self.components.placed.memory.as_dict(),
                "config": flat_values(config.model_copy(update={"sampling": inputs.sampling})),
                "fingerprint": job.fingerprint,
            },
        )
        if not config.output.keep_job:
            job.discard()
        self._recorder.event("request_finished", output=str(job.output), seconds=seconds, frames=plan.frames)
        return RunResult(job.output, job.sidecar, plan.frames, len(plan.windows), done, seconds)

    def _windows(
        self,
        sampling: SamplingConfig,
        conditioning: Conditioning,
        step_plan: StepPlan,
        windows: tuple[Window, ...],
        first: int = 0,
        given: Tensor | None = None,
        make_room: MakeRoom | None = None,
    ) -> Iterator[WindowResult]:
        """`windows[first:]`, made by all processes."""
        self.components.load_for_windows()
        passes = self.components.placed.vae_latents
        self.team.order(WindowsOrder.of(sampling, conditioning, step_plan, windows, first, given, passes))
        self.team.meet()
        generator = self.window_generator(sampling, conditioning, step_plan, make_room=make_room)
        return generator.run(windows, first, given)

    def _adopt(self, inputs: _Inputs, placement: Placement) -> None:
        request = self._request(inputs.sampling, inputs.size, inputs.request.audio is not None)
        self.team.order(PlaceOrder(request, placement.identity()))
        self.components.adopt(placement)

    def _read(self, request: AvatarRequest) -> _Inputs:
        if not request.prompt.strip():
            raise InputError("prompt: is empty; describe the person and the scene in a sentence")
        sampling = effective_sampling(self.config.sampling, request.sampling)
        if request.audio is not None and not self.components.dit_config.audio_dim:
            raise InputError(
                "audio: this checkpoint has no audio layers; leave the audio out or set exp_path"
            )
        image = load_image(request.image)
        height, width = image.shape[:2]
        size = choose_bucket(height, width, self.config.video.sizes)
        return _Inputs(request, sampling, image, size, self.components.cache_constants(sampling))

    def _place(self, inputs: _Inputs, kept: Mapping[str, str | int]) -> Placement:
        """Where the models lie for this request; kept: what a resumed run was begun with."""
        request = self._request(inputs.sampling, inputs.size, inputs.request.audio is not None)
        return self.components.place(request, kept)

    def _request(self, sampling: SamplingConfig, size: tuple[int, int], has_audio: bool) -> Request:
        plan = make_plan(self.config, 0 if has_audio else None, size, sampling)
        return Request(plan, sampling.cache_policy != "none")

    def _plan(self, inputs: _Inputs, waveform_path: Path) -> tuple[np.ndarray | None, RunPlan]:
        """The 16 kHz waveform with its leading silence (memory-mapped), and the plan of windows."""
        video = self.config.video
        waveform: np.ndarray | None = None
        if inputs.request.audio is not None:
            with self._recorder.stage("audio_decode"):
                decode_mono(inputs.request.audio, waveform_path, video.sample_rate, video.silence_duration_s)
            waveform = np.memmap(waveform_path, dtype=np.float32, mode="r")
        samples = None if waveform is None else len(waveform)
        return waveform, make_plan(self.config, samples, inputs.size, inputs.sampling)

    def _condition(
        self, inputs: _Inputs, plan: RunPlan, waveform: np.ndarray | None, features_path: Path
    ) -> Conditioning:
        prompts = inputs.request.prompt, inputs.sampling.negative_prompt
        picture = prepare_image(inputs.image, inputs.size)
        sound = Sound(waveform, plan.frames - 1, plan.padded_audio_frames, features_path)
        return make_conditioning(self.components, self._recorder, prompts, picture, sound)

    def _step_plan(self, sampling: SamplingConfig, constants: CacheConstants | None) -> StepPlan:
        """The step cache's plan, told with the constants it was made by."""
        step_plan = self.components.step_plan(sampling, constants)
        if step_plan.source:
            self._message(
                f"step cache {step_plan.policy}: {step_plan.computed} of {len(step_plan.compute)} steps "
                f"computed; constants {step_plan.source}"
            )
        for note in step_plan.notes:
            self._message(note, "warning")
        return step_plan

    def _choose_encoder(self, size: tuple[int, int]) -> Encoder:
        """The video encoder for frames of `size`; tried once a size."""
        if size not in self._encoders:
            self._encoders[size] = choose_encoder(self.config.output.encoder, size)
        return self._encoders[size]

    def _use_device_clock(self) -> None:
        """Time this thread's stages by the GPU, which the host runs ahead of."""
        if self.components.device.type == "cuda":
            self._recorder.use_clock(DeviceClock(self.components.device))

    def _message(self, text: str, level: str = "info") -> None:
        self._recorder.event("message", text=text, level=level)


def generate(
    config: str | Path | PipelineConfig,
    request: AvatarRequest,
    output: str | Path,
    overrides: Overrides = (),
) -> RunResult:
    """One video from one call; for several, keep an `AvatarPipeline` so that models load once."""
    return AvatarPipeline.from_config(config, overrides).generate(request, output)
