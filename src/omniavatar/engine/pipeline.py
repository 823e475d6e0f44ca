"""The main path: read -> place -> plan -> condition -> windows (denoise, decode, hand over) -> write.

`AvatarPipeline` loads its models once and serves many requests. `stream` yields frames as windows finish.
`generate` writes a video that grows on disk, survives a crash and gets its final name when it is complete.
A result depends only on the request's inputs, its seed and the configuration, not on earlier requests.
If several processes make one video, the leader runs `stream` or `generate`, and the others run `follow`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from omniavatar.accel.residual_cache import PassRunner, ResidualCache
from omniavatar.config.load import Overrides, load_config
from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.clocks import DeviceClock
from omniavatar.engine.events import Message, RequestFinished, RequestStarted
from omniavatar.engine.host import Host
from omniavatar.engine.identity import request_identity
from omniavatar.engine.job import Job, fingerprint
from omniavatar.engine.models import Models
from omniavatar.engine.orders import EndOrder, PlaceOrder, WindowsOrder
from omniavatar.engine.prepare import Prepared, condition, plan_request, read_inputs
from omniavatar.engine.recorder import Elapsed, RunRecorder
from omniavatar.engine.retry import no_retry
from omniavatar.engine.sidecar import sidecar_values
from omniavatar.engine.window_loop import WindowGenerator, WindowResult, WindowSampling
from omniavatar.parallel.team import ONE, Team, check_size
from omniavatar.plan.placement import IDENTITY_FIELDS, Placement
from omniavatar.plan.run import RunPlan, WindowShape
from omniavatar.types import AvatarRequest, Conditioning, RunResult, VideoChunk

if TYPE_CHECKING:
    from omniavatar.model.dit import RunBlocks


class AvatarPipeline:
    """Makes a talking-avatar video from a portrait, a voice and a prompt, for any number of requests."""

    def __init__(
        self,
        config: PipelineConfig,
        recorder: RunRecorder | None = None,
        team: Team = ONE,
        host: Host | None = None,
    ) -> None:
        check_size(team, config.runtime.processes)
        self.config, self.team = config, team
        self._recorder = recorder or RunRecorder()
        self._host = host or Host()
        self._encoders: dict[tuple[int, int], str] = {}
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        self.models = Models(config, self._recorder, team, self._host)

    @classmethod
    def from_config(
        cls,
        config: str | Path | PipelineConfig,
        overrides: Overrides = (),
        recorder: RunRecorder | None = None,
        team: Team = ONE,
        host: Host | None = None,
    ) -> Self:
        """A pipeline from a YAML file with overrides (as `--hp`), or from a configuration object.

        The headers of weight files are checked now; weights are loaded at the first request.
        Raises ConfigError, CheckpointError, ResourceError.
        """
        if not isinstance(config, PipelineConfig):
            config = load_config(config, overrides).config
        return cls(config, recorder, team, host)

    def generate(
        self,
        request: AvatarRequest,
        output: str | Path | None = None,
        resume: bool | None = None,
        index: int = 0,
    ) -> RunResult:
        """Write the request's video to `output` and a JSON sidecar beside it.

        An interrupted run of the same request continues after its last finished window. A finished video of
        the same request is kept. Files that this package did not write are never replaced. A second run of
        the same output, in any process or thread, is refused.

        - output: a path that ends in .mp4, or an existing folder, in which the video gets a free default name
          (default: `output.output_dir` of the configuration). The target of a link is written.
        - resume: False starts over in both cases (default: `output.resume` of the configuration).
        - index: the request's number in events.

        Raises InputError, OutputError, ResumeError, ConfigError, CheckpointError, ResourceError.
        """
        from omniavatar.engine.targets import Identified, Target
        from omniavatar.engine.writer import VideoWriter

        target = Target(None if output is None else Path(output), self.config, request)
        target.check()
        resume = self.config.output.resume if resume is None else resume
        inputs = read_inputs(self.models, request)
        encoder = self._encoder(inputs.shape.size)

        def identify(job: Job) -> Identified:
            kept = job.recorded(IDENTITY_FIELDS) if resume else {}
            placement = self.models.residency.place(inputs.shape, kept)
            values = request_identity(self.config, inputs, encoder, placement, self.models.attention_name)
            return Identified(placement, values)

        with target.owned(identify) as (job, found):
            if resume and (finished := job.finished(found.values)):
                self._message(f"{job.output} is finished already; use --no-resume to make it again")
                return finished
            if resume and job.changed_since(found.values):
                self._message(f"{job.output} has another size than when it was finished; making it again")
            with job.opened(found.values, resume):
                self.adopt(inputs.shape, found.placement)
                elapsed = Elapsed(self._recorder)
                made = plan_request(self.models, inputs, job.folder)
                if job.done:
                    self._go_back(job, made.plan)
                self._announce(job, made.plan, index)
                with VideoWriter(
                    job, made.plan, self.config.output, request.audio, self._recorder, encoder, self._host
                ) as writer:
                    if job.done < len(made.plan.windows):
                        made = ready = condition(self.models, made)
                        for window in self.windows(ready, job.done, job.given()):
                            job.amend(fingerprint(self.models.residency.placement.identity()))
                            writer.submit(window)
                    writer.finish()
                values = sidecar_values(job, made, self.models, self.config, encoder, elapsed)
                result = job.close(values, self.config.output.keep_job)
        self._recorder.event(RequestFinished(str(job.output), result.seconds, result.frames))
        return result

    def stream(self, request: AvatarRequest) -> Iterator[VideoChunk]:
        """Yield the frames of each window when it is finished. Nothing stays on disk."""
        with self.prepare(request) as ready:
            for result in self.windows(ready):
                yield VideoChunk(
                    np.concatenate(result.frames),
                    result.window.first_new_frame,
                    ready.plan.fps,
                    result.window.index,
                    len(ready.plan.windows),
                )

    def follow(self) -> None:
        """Carry out the leader's orders until the last one: load the models, make windows together.

        Only the leader reads inputs, decides and writes. Raises CheckpointError, ResourceError.
        """
        residency = self.models.residency
        while not isinstance(order := self.team.next_order(), EndOrder):
            if isinstance(order, PlaceOrder):
                residency.adopt(residency.place(order.shape, order.identity))
                self.models.load_for_windows()
            else:
                residency.use_vae_pass(order.vae_latents)
                self.team.meet()
                loop = self.window_generator(order.sampling, order.conditioning(self.models.device))
                for _ in loop.run(order.windows, order.first, order.given):
                    pass

    @contextmanager
    def prepare(self, request: AvatarRequest) -> Iterator[Prepared]:
        """Read, plan and encode a request for the caller, who runs its windows inside the body."""
        inputs = read_inputs(self.models, request)
        with tempfile.TemporaryDirectory(prefix="omniavatar-") as folder:
            self.adopt(inputs.shape)
            yield condition(self.models, plan_request(self.models, inputs, Path(folder)))

    def windows(self, ready: Prepared, first: int = 0, given: Tensor | None = None) -> Iterator[WindowResult]:
        """Results of the request's windows from `first` on, made by all processes together.

        - given: given latents of window `first`; None if `first` is 0.
        """
        self.models.load_for_windows()
        sampling, windows = ready.window_sampling, ready.plan.windows
        latents = self.models.residency.placement.vae_latents
        self.team.order(WindowsOrder.of(sampling, ready.conditioning, windows, first, given, latents))
        self.team.meet()
        return self.window_generator(sampling, ready.conditioning).run(windows, first, given)

    def window_generator(
        self,
        sampling: WindowSampling,
        conditioning: Conditioning,
        make_cache: Callable[[RunBlocks], PassRunner] = ResidualCache,
    ) -> WindowGenerator:
        """The object that denoises and decodes windows. A single process retries with less GPU memory."""
        models = self.models
        retry = no_retry if self.team.size > 1 else models.residency.retry
        return retry(
            lambda: WindowGenerator(
                models.dit,
                models.window_vae,
                conditioning,
                sampling,
                self._recorder,
                make_cache=make_cache,
                retry=retry,
                team=self.team,
                run_blocks=models.residency.run_blocks,
                arrival=self._host.arrival,
            )
        )

    def adopt(self, shape: WindowShape, placement: Placement | None = None) -> None:
        """Put a placement for windows of `shape` in force on all processes; None plans one first."""
        if self.models.device.type == "cuda":
            self._recorder.use_clock(DeviceClock(self.models.device))
        placement = placement or self.models.residency.place(shape, {})
        self.team.order(PlaceOrder(shape, placement.identity()))
        self.models.residency.adopt(placement)

    def _go_back(self, job: Job, plan: RunPlan) -> None:
        """Let an interrupted job go on from its last good window."""
        from omniavatar.engine.resume import go_on_from_good

        if note := go_on_from_good(job, plan):
            self._message(note)

    def _announce(self, job: Job, plan: RunPlan, index: int) -> None:
        self._recorder.event(
            RequestStarted(
                index=index,
                name=job.output.name,
                frames=plan.frames,
                windows=len(plan.windows),
                steps=plan.steps,
                resumed_windows=job.done,
                preview=str(job.partial),
            )
        )
        if job.done:
            self._message(f"resuming {job.output.name} at window {job.done + 1} of {len(plan.windows)}")

    def _encoder(self, size: tuple[int, int]) -> str:
        """The video encoder for frames of `size`, chosen once for each size."""
        if size not in self._encoders:
            self._encoders[size] = self._host.choose_encoder(self.config.output.encoder, size)
        return self._encoders[size]

    def _message(self, text: str) -> None:
        self._recorder.event(Message(text))


def generate(
    config: str | Path | PipelineConfig,
    request: AvatarRequest,
    output: str | Path,
    overrides: Overrides = (),
) -> RunResult:
    """Make one video with one call. For several, keep an `AvatarPipeline`, so that models are loaded once."""
    return AvatarPipeline.from_config(config, overrides).generate(request, output)
