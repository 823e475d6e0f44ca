"""What `AvatarPipeline` and the package's own commands share: one configuration, its models, its processes.

A session places the models, prepares a request, and makes its windows by all processes together. If several
processes make one video, the leader does this, and the others run `follow`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from omniavatar.accel.decoder import DECODERS
from omniavatar.accel.residual_cache import PassRunner, ResidualCache
from omniavatar.config.schema import PipelineConfig
from omniavatar.engine.clocks import DeviceClock
from omniavatar.engine.events import Message
from omniavatar.engine.host import Host
from omniavatar.engine.models import Models
from omniavatar.engine.numbers import remedy
from omniavatar.engine.orders import EndOrder, PlaceOrder, WindowsOrder
from omniavatar.engine.prepare import Prepared, condition, plan_request, read_inputs
from omniavatar.engine.recorder import RunRecorder
from omniavatar.engine.retry import no_retry
from omniavatar.engine.window_loop import (
    ShouldStop,
    WatchStep,
    WindowGenerator,
    WindowResult,
    WindowSampling,
    never,
)
from omniavatar.errors import StoppedError
from omniavatar.media.temporary import temporary_folder
from omniavatar.parallel.team import ONE, Team, check_size
from omniavatar.plan.placement import Placement
from omniavatar.plan.preview import with_family
from omniavatar.plan.run import WindowShape
from omniavatar.sampling.windows import HandOvers, WindowHandOvers
from omniavatar.types import AvatarRequest, Conditioning, ImageInput, SamplingParams, Window

if TYPE_CHECKING:
    from omniavatar.engine.block_session import BlockSession
    from omniavatar.engine.block_video import BlockVideo
    from omniavatar.engine.shown import Shown
    from omniavatar.engine.step_watch import StepWatch
    from omniavatar.model.dit import RunBlocks


class Closes(Protocol):
    """Something that is closed when it is no longer needed."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closes)


class Session:
    """Runs windows with the models of one configuration."""

    def __init__(
        self,
        config: PipelineConfig,
        recorder: RunRecorder | None = None,
        team: Team = ONE,
        host: Host | None = None,
    ) -> None:
        config = with_family(config)
        check_size(team, config.runtime.processes)
        self.config, self.team = config, team
        self._lock = threading.Lock()
        self._companions: dict[type[object], Closes] = {}
        self._watch: StepWatch | None = None
        self._recorder = recorder or RunRecorder()
        self._host = host or Host()
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        self._models: Models | None = Models(config, self._recorder, team, self._host)

    @property
    def models(self) -> Models:
        """The models. Raises RuntimeError after `close`."""
        if self._models is None:
            raise RuntimeError("this pipeline is closed; make another one")
        return self._models

    @models.setter
    def models(self, models: Models) -> None:
        """Serve with models that are loaded already, such as those of another pipeline."""
        self._models = models

    def companion(self, kind: type[T], make: Callable[[], T]) -> T:
        """The one object of class `kind` that belongs to this session; `make` makes it at the first call.

        Its `close` is called before the models are freed.
        """
        with self._lock:
            found = self._companions.get(kind)
            if not isinstance(found, kind):
                self._companions[kind] = found = make()
            return found

    def close_companions(self) -> None:
        """Close what `companion` made."""
        with self._lock:
            companions, self._companions = list(self._companions.values()), {}
        for each in companions:
            each.close()

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
                self._follow_windows(order)

    def _follow_windows(self, order: WindowsOrder) -> None:
        stop = (lambda: self.team.stops(None)) if order.stoppable else None
        conditioning = order.conditioning(self.models.device)
        loop = self.window_generator(order.sampling, conditioning, stop=stop)
        try:
            for _ in loop.run(order.windows, order.first, order.given, order.shown):
                pass
        except StoppedError:
            return  # the leader reports it

    @contextmanager
    def prepare(self, request: AvatarRequest, should_stop: ShouldStop = never) -> Iterator[Prepared]:
        """Read, plan and encode a request for the caller, who runs its windows inside the body."""
        from omniavatar.engine.memory_inputs import in_files

        with in_files(request) as local, temporary_folder() as folder:
            inputs = read_inputs(self.models, local)
            self.adopt(inputs.shape)
            yield condition(self.models, plan_request(self.models, inputs, folder), should_stop)

    def windows(
        self,
        ready: Prepared,
        first: int = 0,
        given: Mapping[int, Tensor] | None = None,
        should_stop: ShouldStop = never,
        shown: Shown | None = None,
    ) -> Iterator[WindowResult]:
        """Results of the request's windows from `first` on, made by all processes together.

        - given: what window `first` starts from, by the numbers of `hand_overs`; None if `first` is 0.
        - shown: what the pictures before window `first` left (`WindowResult.shown`).
        """
        sampling, conditioning, windows = ready.window_sampling, ready.conditioning, ready.plan.windows
        given = given or {}
        if self._watch is not None:
            self._watch.begin(ready.plan, first)
        if sampling.causal is None:
            return self.run_windows(
                sampling, conditioning, windows, first, given.get(first), should_stop, shown
            )
        past = {number - 1: latent for number, latent in given.items()}
        return self.block_session().run(sampling, conditioning, windows, first, past, should_stop, shown)

    def hand_overs(self, shape: WindowShape) -> HandOvers:
        """Which hand-over files windows of `shape` start from."""
        causal = shape.causal
        if causal is None:
            return WindowHandOvers(shape.anchor_every)
        from omniavatar.sampling.causal import BlockHandOvers

        decoded = causal.blocks_of(DECODERS.get(self.config.model.decoder).past_latents)
        return BlockHandOvers(causal, self.models.dit_config.num_layers, decoded)

    def begin_video(
        self, image: ImageInput, prompt: str, sampling: SamplingParams | None = None
    ) -> BlockVideo:
        """An endless video of this person by a block-causal model, for sound that is not known yet.

        The models are loaded now. The size is the configured one nearest to the portrait's shape.

        Raises ConfigError if the sampler is not causal, and what `prepare` raises.
        """
        request = AvatarRequest(prompt, image, sampling=sampling or SamplingParams())
        return self.block_session().begin(request, self.adopt)

    def block_session(self) -> BlockSession:
        """What makes blocks with this session's models."""
        from omniavatar.engine.block_session import BlockSession

        return BlockSession(self.models, self._host.arrival, lambda: self._remedy, self._watch_step)

    def run_windows(
        self,
        sampling: WindowSampling,
        conditioning: Conditioning,
        windows: Sequence[Window],
        first: int = 0,
        given: Tensor | None = None,
        should_stop: ShouldStop = never,
        shown: Shown | None = None,
    ) -> Iterator[WindowResult]:
        """`windows`, for a plan that no request has."""
        self.models.load_for_windows()
        latents, stoppable = self.models.residency.placement.vae_latents, should_stop is not never
        self.team.order(
            WindowsOrder.of(sampling, conditioning, windows, first, given, latents, stoppable, shown)
        )
        self.team.meet()
        stop = (lambda: self.team.stops(should_stop())) if stoppable else None
        return self.window_generator(sampling, conditioning, stop=stop).run(windows, first, given, shown)

    def window_generator(
        self,
        sampling: WindowSampling,
        conditioning: Conditioning,
        make_cache: Callable[[RunBlocks], PassRunner] = ResidualCache,
        stop: Callable[[], bool] | None = None,
    ) -> WindowGenerator:
        """The object that denoises and decodes windows. A single process retries with less GPU memory."""
        models = self.models
        retry = no_retry if self.team.size > 1 else models.residency.retry
        tries = self._remedy
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
                sparse=models.sparse_steps(sampling.sparsity),
                arrival=self._host.arrival,
                stop=stop,
                remedy=tries,
                watch=self._watch_step,
            )
        )

    @property
    def _watch_step(self) -> WatchStep | None:
        """What is called after each step of the run in hand; nothing without a callback and a bar."""
        return None if self._watch is None else self._watch.step

    @property
    def _remedy(self) -> str:
        """What to try after numbers overflowed."""
        models = self.models
        return remedy(self.config, models.attention_name, models.residency.placement.quantize)

    def adopt(self, shape: WindowShape, placement: Placement | None = None) -> None:
        """Put a placement for windows of `shape` in force on all processes; None plans one first."""
        if self.models.device.type == "cuda":
            self._recorder.use_clock(DeviceClock(self.models.device))
        placement = placement or self.models.residency.place(shape, {})
        self.team.order(PlaceOrder(shape, placement.identity()))
        self.models.residency.adopt(placement)

    def _message(self, text: str) -> None:
        self._recorder.event(Message(text))
