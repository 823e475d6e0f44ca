"""The main path: read -> place -> plan -> condition -> windows (denoise, decode, hand over) -> write.

`AvatarPipeline` loads its models once and serves many requests. `stream` yields frames as windows finish.
`generate` writes a video that grows on disk, survives a crash and gets its final name when it is complete.
A result depends only on the request's inputs, its seed and the configuration, not on earlier requests.
If several processes make one video, the leader runs `stream` or `generate`, and the others run `follow`
(`engine.session`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.events import Message, RequestFinished, RequestStarted, log_event
from omniavatar.engine.host import Host
from omniavatar.engine.identity import request_identity
from omniavatar.engine.job import Job, fingerprint
from omniavatar.engine.prepare import condition, plan_request, read_inputs
from omniavatar.engine.recorder import Elapsed, RunRecorder
from omniavatar.engine.session import Session
from omniavatar.engine.window_loop import ShouldStop, end_if, never
from omniavatar.media.temporary import temporary_folder
from omniavatar.parallel.team import ONE, Team
from omniavatar.plan.placement import IDENTITY_FIELDS
from omniavatar.plan.run import RunPlan
from omniavatar.types import AvatarRequest, Event, RunResult, VideoChunk

if TYPE_CHECKING:
    from omniavatar.config.load import Overrides
    from omniavatar.engine.memory_inputs import LocalRequest
    from omniavatar.engine.provenance import Signing
    from omniavatar.engine.step_watch import StepCallback
    from omniavatar.engine.targets import Target


class AvatarPipeline(Session):
    """Makes a talking-avatar video from a portrait, a voice and a prompt, for any number of requests.

    It runs one request at a time; use it in one thread, or under a lock. `close` frees the models, also at
    the end of a `with` block.
    """

    def __init__(
        self,
        config: PipelineConfig,
        recorder: RunRecorder | None = None,
        team: Team = ONE,
        host: Host | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        if recorder is not None and on_event is not None:
            raise ValueError("give a recorder or on_event, not both: a recorder has its own listeners")
        listeners = [log_event] if on_event is None else [log_event, on_event]
        super().__init__(config, recorder or RunRecorder(listeners), team, host)
        self._encoders: dict[tuple[int, int], str] = {}
        self._bar_options: dict[str, Any] = {"disable": True}
        self._interrupt = False

    @classmethod
    def from_config(
        cls,
        config: str | Path | PipelineConfig,
        overrides: Overrides = (),
        recorder: RunRecorder | None = None,
        team: Team = ONE,
        host: Host | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Self:
        """A pipeline from a YAML file with overrides (as `--hp`), or from a configuration object.

        The headers of weight files are checked now; weights are loaded at the first request, or by `warm_up`.

        - on_event: called for every event, as `on_event(event)`. Its exception ends the run.
        - recorder: replaces both `on_event` and the messages to the logger `omniavatar`.

        Raises ConfigError, CheckpointError, ResourceError.
        """
        if not isinstance(config, PipelineConfig):
            from omniavatar.config.load import load_config

            config = load_config(config, overrides).config
        return cls(config, recorder, team, host, on_event)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        overrides: Overrides = (),
        scale: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Self:
        """A pipeline from a folder of weights, as `omniavatar download` or `make-checkpoint` leaves it.

        The settings are those of the configuration that belongs to these weights. A folder with one YAML file
        has its settings there, with paths relative to the folder. `pocket` and `pocket-live` are the packaged
        models.

        - overrides: settings that replace them, such as `{"num_steps": 15}`, or texts as of `--hp`.
        - scale: 14B, 1.3B, livetalk, flashhead, leaptalk, or nano, livetalk-nano, flashhead-nano or
          leaptalk-nano, if the folder holds several.
        - on_event: as for `from_config`.

        Raises ConfigError, CheckpointError with the files that are missing, ResourceError.
        """
        from omniavatar.engine.pretrained import pretrained_config

        return cls(pretrained_config(folder, overrides, scale), on_event=on_event)

    def warm_up(self, size: tuple[int, int] | None = None) -> None:
        """Load the models and run one step of two windows, so that the first request starts at once.

        - size: (height, width) of the windows; default: the first size of the configuration.

        Raises ConfigError, CheckpointError, ResourceError, NumbersError.
        """
        from omniavatar.engine.warm_up import warm_up

        warm_up(self, size)

    def generate(
        self,
        request: AvatarRequest,
        output: str | Path | None = None,
        resume: bool | None = None,
        index: int = 0,
        should_stop: ShouldStop = never,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> RunResult:
        """Write the request's video to `output` and a JSON sidecar beside it.

        An interrupted run of the same request continues after its last finished window. A finished video of
        the same request is kept. Files that this package did not write are never replaced. A second run of
        the same output, in any process or thread, is refused.

        - output: a path that ends in .mp4, or an existing folder, in which the video gets a free default name
          (default: `output.output_dir` of the configuration). The target of a link is written.
        - resume: False starts over in both cases (default: `output.resume` of the configuration).
        - index: the request's number in events.
        - should_stop: called before every step, such as `threading.Event().is_set`; True ends the run.
        - callback_on_step_end: called as `callback(pipe, step, timestep, kwargs)` after each step. `kwargs`
          holds `window` and `windows` (numbers) and `latents`, a copy (1, 16, T, h, w) float32 of the
          window's sample on the device; T latent frames. It may set `pipe.interrupt = True`, which ends the
          run before the next step as `should_stop` does. It cannot change the latents. Steps are queued
          ahead on a GPU: a callback that reads the latents waits for it.
        - callback_on_step_end_tensor_inputs: `()` leaves the latents out, so nothing is copied.

        Raises InputError, OutputError, ResumeError, ConfigError, CheckpointError, ResourceError,
        NumbersError, StoppedError.
        """
        from omniavatar.engine.memory_inputs import in_files
        from omniavatar.engine.targets import Target

        with in_files(request) as local:
            target = Target(None if output is None else Path(output), self.config, local)
            target.check()
            with self._watching(
                callback_on_step_end, callback_on_step_end_tensor_inputs, should_stop
            ) as ends:
                return self._generate(local, target, resume, index, ends)

    def _generate(
        self, request: LocalRequest, target: Target, resume: bool | None, index: int, should_stop: ShouldStop
    ) -> RunResult:
        from omniavatar.engine.room import check_room, least_bytes
        from omniavatar.engine.segments import Segments
        from omniavatar.engine.sidecar import sidecar_values
        from omniavatar.engine.targets import Identified
        from omniavatar.engine.writer import VideoWriter

        resume = self.config.output.resume if resume is None else resume
        signing = self._signing(request)
        inputs = read_inputs(self.models, request)
        encoder = self._encoder(inputs.shape.size)

        def identify(job: Job) -> Identified:
            kept = job.recorded(IDENTITY_FIELDS) if resume else {}
            placement = self.models.residency.place(inputs.shape, kept)
            return Identified(
                placement, request_identity(self.config, inputs, encoder, placement, self.models)
            )

        with target.owned(identify) as (job, found):
            if resume and (finished := job.finished(found.values)):
                if signing is not None and not signing.has_signed(job):
                    signing.sign_finished(job, inputs)
                    self._message(f"{job.output} is finished already; it was signed")
                    return finished
                self._message(f"{job.output} is finished already; use --no-resume to make it again")
                return finished
            if resume and job.changed_since(found.values):
                self._message(f"{job.output} has another size than when it was finished; making it again")
            end_if(should_stop(), "before it began")
            with job.opened(found.values, resume):
                self.adopt(inputs.shape, found.placement)
                elapsed = Elapsed(self._recorder)
                made = plan_request(self.models, inputs, job.folder)
                job.hand_overs = self.hand_overs(made.plan)
                if job.done:
                    self._go_back(job, made.plan)
                output, begun = self.config.output, inputs.begun
                segments = Segments(job, made.plan, output, encoder, self._host, begun is not None)
                needed = least_bytes(made.plan, output.crf, job.done, segments.kept_frames)
                check_room(job.output, needed, self._host.free_disk(job.folder))
                if begun is not None and not job.done:
                    from omniavatar.engine.continuation import begin

                    begin(job, self.models, begun, made.plan.overlap, segments.write_alone)
                self._announce(job, made.plan, index)
                if note := segments.resume():
                    self._message(note)
                with VideoWriter(job, made.plan, segments, made.sound, self._recorder) as writer:
                    if job.done < len(made.plan.windows):
                        made = ready = condition(self.models, made, should_stop)
                        given = job.given(ready.given_shape(job.done))
                        shown = job.shown(made.plan.size, *ready.needs_shown)
                        for window in self.windows(ready, job.done, given, should_stop, shown):
                            job.amend(fingerprint(self.models.residency.placement.identity()))
                            writer.submit(window)
                    writer.finish(None if signing is None else signing.of(inputs, job.output))
                values = sidecar_values(job, made, self.models, self.config, encoder, elapsed)
                if signing is not None:
                    values["provenance"] = signing.record
                result = job.close(values, output.keep_job)
        self._recorder.event(RequestFinished(str(job.output), result.seconds, result.frames))
        return result

    def stream(
        self,
        request: AvatarRequest,
        should_stop: ShouldStop = never,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Iterator[VideoChunk]:
        """Yield the frames of each window when it is finished. Nothing stays on disk.

        A request that continues a video yields the new frames only.

        - should_stop, callback_on_step_end, callback_on_step_end_tensor_inputs: as for `generate`.

        Raises what `generate` raises.
        """
        from omniavatar.engine.provenance import refuse_frames

        refuse_frames(self.config.output, request)
        with (
            self._watching(callback_on_step_end, callback_on_step_end_tensor_inputs, should_stop) as ends,
            self.prepare(request, ends) as ready,
        ):
            first, given, shown = 0, None, None
            if ready.inputs.begun is not None:
                from omniavatar.engine.continuation import last_frames, latents_of, shown_last

                frames = last_frames(ready.inputs.begun, ready.plan.overlap)
                first, given = 1, {1: latents_of(self.models, frames)}
                shown = shown_last(frames, *ready.needs_shown)
            for result in self.windows(ready, first, given, ends, shown):
                yield VideoChunk(
                    np.concatenate(result.frames),
                    result.window.first_new_frame,
                    ready.plan.fps,
                    result.window.index,
                    len(ready.plan.windows),
                )

    def plan(self, request: AvatarRequest) -> dict[str, Any]:
        """What the request's video will be, and the memory it needs, as `omniavatar plan --json` prints it.

        Reads the request and the headers of the weight files; loads no weights. A request that continues a
        video counts its frames too.

        Raises InputError, ConfigError, CheckpointError.
        """
        from omniavatar.engine.memory_inputs import in_files
        from omniavatar.plan.estimate import estimate_memory, plan_report

        with in_files(request) as local, temporary_folder() as folder:
            plan = plan_request(self.models, read_inputs(self.models, local), folder).plan
        memory = estimate_memory(self.config, plan, self.models.device)
        return plan_report(plan, memory, self.config)

    @property
    def interrupt(self) -> bool:
        """Whether the run in hand ends before its next step. Only a run with a callback reads it."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, ends: bool) -> None:
        self._interrupt = ends

    def set_progress_bar_config(self, **options: Any) -> None:
        """Show a progress bar of the steps in later runs, with these options of tqdm.

        A pipeline begins with `disable` set to True, so none is shown. No options: tqdm's defaults.
        """
        self._bar_options = options

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A bar of tqdm with the configured options, for the caller's own loop."""
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._bar_options)

    @contextmanager
    def _watching(
        self, callback: StepCallback | None, tensors: Sequence[str], should_stop: ShouldStop
    ) -> Iterator[ShouldStop]:
        """Report the steps of a run while the body runs; yields what ends the run."""
        shown = not self._bar_options.get("disable")
        if callback is None and not shown:
            yield should_stop
            return
        from omniavatar.engine.step_watch import StepWatch

        bar = (lambda steps: self.progress_bar(total=steps)) if shown else None
        self._interrupt, self._watch = False, (watch := StepWatch(self, callback, tensors, bar))
        try:
            yield should_stop if callback is None else lambda: self._interrupt or should_stop()
        finally:
            watch.close()
            if self._watch is watch:  # a stream that was left open may end during another run
                self._watch = None

    def close(self) -> None:
        """End live sessions; free the models and their memory. A closed pipeline makes no more videos."""
        self.close_companions()
        models, self._models = self._models, None
        if models is not None:
            models.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _go_back(self, job: Job, plan: RunPlan) -> None:
        """Let an interrupted job go on from its last good window."""
        from omniavatar.engine.resume import go_on_from_good

        if note := go_on_from_good(job, plan):
            self._message(note)

    def _signing(self, request: LocalRequest) -> Signing | None:
        """What signs the request's video; None if it gets no manifest."""
        from omniavatar.engine.provenance import Signing, is_wanted

        if not is_wanted(self.config.output, request):
            return None
        signing = Signing(self.config.output, request)
        for warning in signing.warnings:
            self._recorder.event(Message(warning, "warning"))
        return signing

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


def generate(
    config: str | Path | PipelineConfig,
    request: AvatarRequest,
    output: str | Path,
    overrides: Overrides = (),
) -> RunResult:
    """Make one video with one call. For several, keep an `AvatarPipeline`, so that models are loaded once."""
    return AvatarPipeline.from_config(config, overrides).generate(request, output)
