"""What a session makes with a block-causal model: the windows of a request, or an endless video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from omniavatar.accel.decoder import DECODERS
from omniavatar.engine.block_video import BlockVideo, Past
from omniavatar.engine.block_windows import BlockWindows
from omniavatar.engine.memory_inputs import in_files
from omniavatar.engine.prepare import encode_person, read_inputs
from omniavatar.engine.window_loop import ShouldStop, WatchStep, WindowResult, WindowSampling, never
from omniavatar.errors import ConfigError
from omniavatar.types import AvatarRequest, Conditioning, Window

if TYPE_CHECKING:
    import torch

    from omniavatar.config.schema import SamplingConfig
    from omniavatar.engine.models import Models
    from omniavatar.engine.shown import Shown
    from omniavatar.plan.run import WindowShape


class BlockSession:
    """Makes blocks with loaded models.

    - arrival: `Host.arrival`.
    - remedy: what to try after numbers overflowed; called when a placement is in force.
    - watch: called after each step of a request.
    """

    def __init__(
        self,
        models: Models,
        arrival: Callable[[torch.device], Callable[[], None]],
        remedy: Callable[[], str],
        watch: WatchStep | None = None,
    ) -> None:
        self._models, self._remedy, self._watch = models, remedy, watch
        self._arrival = partial(arrival_of_all, arrival, tuple({models.device, models.vae_device}))

    def run(
        self,
        sampling: WindowSampling,
        conditioning: Conditioning,
        windows: tuple[Window, ...],
        first: int = 0,
        past: Past | None = None,
        should_stop: ShouldStop = never,
        shown: Shown | None = None,
    ) -> Iterator[WindowResult]:
        """Results of `windows` from `first` on.

        - past: latents of earlier blocks that block `first` starts from; None if `first` is 0.
        - shown: see `Session.windows`.
        """
        models = self._models
        loop = BlockWindows(
            self.video(sampling, conditioning.text_positive, conditioning.reference_latent),
            conditioning.audio,
            len(sampling.schedule),
            models.recorder,
            retry=models.residency.retry,
            arrival=self._arrival,
            stop=None if should_stop is never else should_stop,
            remedy=self._remedy(),
            watch=self._watch,
        )
        return loop.run(windows, first, past, shown)

    def begin(self, request: AvatarRequest, adopt: Callable[[WindowShape], None]) -> BlockVideo:
        """See `Session.begin_video`. The request's audio is not read.

        - adopt: puts a placement for such windows in force.
        """
        models, sampling = self._models, self._models.config.sampling
        if sampling.causal is None:
            raise ConfigError(
                f"sampler: {sampling.sampler} makes windows of a whole recording; an endless video needs "
                "sampler: causal and its weights, as in configs/livetalk.yaml"
            )
        with in_files(request) as local:
            inputs = read_inputs(models, local, bool(models.dit_config.audio_dim))
            adopt(inputs.shape)
            text, reference = models.residency.retry(lambda: encode_person(models, inputs))
        return self.video(
            block_sampling(inputs.sampling, inputs.shape, models.config.video.hold_background),
            text,
            reference,
        )

    def video(self, sampling: WindowSampling, text: Tensor, reference_latent: Tensor) -> BlockVideo:
        """A video on the loaded models. A placement must be in force.

        - text, reference_latent: of `types.Conditioning`.
        """
        models = self._models
        models.load_for_windows()

        def embed(prompt: str) -> Tensor:
            (embedding,) = models.prompts.embed((prompt,))
            return embedding

        return models.residency.retry(
            lambda: BlockVideo(
                models.dit,
                models.vae,
                text,
                reference_latent,
                sampling,
                models.config.video.fps,
                DECODERS.get(models.config.model.decoder).past_latents,
                models.dtype,
                embed=embed,
                wrap=models.residency.wrap,
                arrival=self._arrival,
                remedy=self._remedy(),
            )
        )


def block_sampling(sampling: SamplingConfig, shape: WindowShape, hold_background: float) -> WindowSampling:
    """How the blocks of a block-causal model are sampled, and what is held of them."""
    return WindowSampling(
        sampling.seed,
        shape.schedule,
        (),
        sampling.sampler,
        shape.causal,
        noise_span=sampling.noise_span,
        noise_white=sampling.noise_white,
        hold_background=hold_background,
    )


def arrival_of_all(
    arrival: Callable[[torch.device], Callable[[], None]],
    devices: Sequence[torch.device],
    device: torch.device,
) -> Callable[[], None]:
    """A function that waits for what is queued on all `devices`; the latents lie on `device`, one of them."""
    waits = [arrival(each) for each in devices]

    def finish() -> None:
        for wait in waits:
            wait()

    return finish
