"""The long-video loop: windows are denoised one after the other, each from the end of the previous one.

The loop never waits for the device. It queues work, uploads and downloads; only reading a `WindowResult`
waits. So the next window is queued while this one is computed, copied, encoded and written.

The hand-over goes through pixels. The last `overlap` frames of a window are clipped to [0, 1], matched to
the portrait's colours if `color_match` says so, kept as floats and encoded again; they are the next window's
given latents. A latent from the middle of a clip cannot be used, because the causal VAE codes the first frame
of a clip alone. With `hand_over: clean` only the first of these frames is encoded, and the last latents
follow as they are, with the model's own colours. LeapTalk may hand over nothing but latents (`latents`). An
anchored window begins with the portrait, as window 0 does.

Several processes (`parallel.team`) denoise a window together. They share the VAE's work (`parallel.vae`), or
the leader does it and sends the given latents to the others.
Source: OmniAvatar (arXiv 2506.18866).

Shapes: T latent frames, h w latent pixels, N video frames, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omniavatar.accel.residual_cache import PassRunner, ResidualCache
from omniavatar.device import arrival, download
from omniavatar.engine.events import StepFinished, WindowStarted
from omniavatar.engine.numbers import WindowNumbers
from omniavatar.engine.retry import Retry, no_retry
from omniavatar.errors import StoppedError
from omniavatar.parallel.team import ONE, Team
from omniavatar.sampling.denoise import denoise as denoise_window
from omniavatar.sampling.denoise import noises_drawn
from omniavatar.sampling.noise import NoiseAhead
from omniavatar.sampling.passes import Pass, Passes
from omniavatar.sampling.samplers import SAMPLERS
from omniavatar.sampling.schedule import Schedule
from omniavatar.types import Conditioning, Recorder, Window

if TYPE_CHECKING:
    from omniavatar.accel.sparse_steps import SparseSteps
    from omniavatar.config.families import HandOver
    from omniavatar.engine.shown import Shown
    from omniavatar.model.dit import RunBlocks, WanDiT
    from omniavatar.model.vae import VideoVAE
    from omniavatar.sampling.causal import CausalWindow
    from omniavatar.sampling.chunks import ChunkRule
    from omniavatar.sampling.sparsity import SparsityPlan

DrawNoise = Callable[[], Tensor]
ShouldStop = Callable[[], bool]
"""The caller's: returns True once the run must end, such as `threading.Event().is_set`."""
WatchStep = Callable[[Window, int, Tensor], None]
"""Called after each step is queued: its window, its number, and its sample (1, 16, T, h, w) float32."""


def never() -> bool:
    """The `should_stop` of a run that nobody stops."""
    return False


def end_if(stop: bool, where: str) -> None:
    """Raise StoppedError if `stop`. It is called before each step and each encoder."""
    if stop:
        raise StoppedError(f"the run was stopped {where}; finished windows are kept")


@dataclass(frozen=True)
class WindowSampling:
    """How every window of one request is sampled.

    - passes: the forwards of each step (`plan_passes`).
    - causal: the window of a block-causal model, whose windows are blocks (`engine.block_windows`).
    - chunk: of a model that works in chunks.
    - noise_span, noise_white: see `sampling.noise`; more than 1 and 0 only with `causal`.
    - hand_over, color_match, blend_frames, hold_background: see the settings.
    - sparsity: which blocks of attention are computed; None for all.
    """

    seed: int
    schedule: Schedule
    passes: Passes
    sampler: str = "euler"
    causal: CausalWindow | None = None
    chunk: ChunkRule | None = None
    hand_over: HandOver = "pixels"
    color_match: float = 0.0
    sparsity: SparsityPlan | None = None
    noise_span: int = 1
    noise_white: int = 0
    blend_frames: int = 0
    hold_background: float = 0.0


class WindowResult:
    """One window, queued or finished. Reading `frames` or `next_given` waits for it, in any thread.

    Reading also raises NumbersError if the window's numbers are not finite.

    - latent: (1, 16, T, h, w) float32 on the device.
    - started: host time (`time.perf_counter`) at which the window was queued.
    """

    def __init__(
        self,
        window: Window,
        latent: Tensor,
        frames: list[np.ndarray],
        next_given: Tensor | None,
        wait: Callable[[], None],
        started: float,
        shown: Shown | None = None,
    ) -> None:
        self.window, self.latent, self.started = window, latent, started
        self._shown = shown
        self._frames, self._next_given, self._wait = frames, next_given, wait

    def wait(self) -> None:
        """Wait for the window. Raises NumbersError."""
        self._wait()

    @property
    def frames(self) -> list[np.ndarray]:
        """The new frames only, as `convert` returned them."""
        self._wait()
        return self._frames

    @property
    def next_given(self) -> Tensor | None:
        """The next window's given latents (1, 16, G, h, w) float32 on the host; None after the last."""
        self._wait()
        return self._next_given

    @property
    def shown(self) -> Shown | None:
        """What the pictures leave for the next window, on the host; None if it needs nothing of them."""
        self._wait()
        return self._shown


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Convert pixels (1, 3, N, H, W) in [0, 1] to (N, H, W, 3) uint8 on the CPU, rounded, not truncated.

    The copy from a CUDA device is only queued (`device.download`).
    """
    return download((pixels[0].permute(1, 2, 3, 0) * 255.0).round_().to(torch.uint8).contiguous()).numpy()


def _arrived(wait: Callable[[], None], numbers: WindowNumbers) -> None:
    wait()
    numbers.check()


class WindowGenerator:
    """Generates the windows of one request with loaded models.

    Only the leader has audio rows in its conditioning, and only the leader's results carry frames.

    - vae: None on ranks that leave the VAE to the leader.
    - draw_noise: replaces the seeded noise.
    - run_blocks: replaces the DiT's own.
    - sparse: replaces `run_blocks` where attention is sparse.
    - stop: returns whether the run must end; all ranks call it before each step and get the same answer.
    - remedy: what to try if a window's numbers are not finite, for the error.
    - watch: called after each step.
    """

    def __init__(
        self,
        dit: WanDiT,
        vae: VideoVAE | None,
        conditioning: Conditioning,
        sampling: WindowSampling,
        recorder: Recorder,
        convert: Callable[[Tensor], np.ndarray] = to_uint8,
        draw_noise: Callable[[Window, tuple[int, ...]], DrawNoise] | None = None,
        make_cache: Callable[[RunBlocks], PassRunner] = ResidualCache,
        retry: Retry = no_retry,
        team: Team = ONE,
        run_blocks: RunBlocks | None = None,
        sparse: SparseSteps | None = None,
        arrival: Callable[[torch.device], Callable[[], None]] = arrival,
        stop: Callable[[], bool] | None = None,
        remedy: str = "check the weight files",
        watch: WatchStep | None = None,
    ) -> None:
        self._run_blocks, self._arrival = sparse or run_blocks or dit.run_blocks, arrival
        self._sparse = sparse
        self._stop, self._remedy, self._watch = stop, remedy, watch
        self._dit = dit
        self._sampling, self._recorder = sampling, recorder
        self._device = conditioning.reference_latent.device
        self._noise = NoiseAhead(
            sampling.seed, self._device, noises_drawn(sampling.schedule, sampling.sampler)
        )
        self._draw_noise = draw_noise
        self._reference = conditioning.reference_latent
        self._make_cache, self._retry, self._team = make_cache, retry, team
        self._passes = sampling.passes
        carried = any(each.keep for row in self._passes for each in row)
        self._always_ordered = carried or make_cache is not ResidualCache
        self._velocities = team.velocities(self._passes)
        self._timesteps = torch.tensor(sampling.schedule.timesteps, dtype=torch.float32, device=self._device)
        from omniavatar.engine.window_inputs import window_inputs

        branches = {each.branch for row in self._passes for each in row}
        self._inputs = window_inputs(dit, conditioning, branches, team, sampling.chunk)
        self._pixels: WindowPixels | None = None
        if vae is not None:
            from omniavatar.engine.window_pixels import WindowPixels

            self._pixels = WindowPixels(
                vae,
                sampling.hand_over,
                sampling.color_match,
                sampling.blend_frames,
                sampling.hold_background,
                conditioning.portrait,
                self._device,
                team.leads,
                convert,
            )

    def run(
        self,
        windows: Sequence[Window],
        first: int = 0,
        given: Tensor | None = None,
        shown: Shown | None = None,
    ) -> Iterator[WindowResult]:
        """Yield the results of `windows[first:]`.

        `retry` starts a window again, with the same noise, after an allocation failed.

        - given: the given latents of window `first`; None if it starts from the portrait.
        - shown: what the pictures before window `first` left, as a result's `shown`.

        Raises StoppedError, and on the CPU NumbersError; elsewhere reading a result raises that.
        """
        current = self._inputs.first_given if given is None else given.to(self._device)
        before = shown
        try:
            for window in windows[first:]:
                self._recorder.event(WindowStarted(window=window.index, windows=len(windows)))
                last = window.index == len(windows) - 1
                following = None if last else windows[window.index + 1]
                anchors = following is not None and following.anchored
                overlap = 0 if following is None or anchors else following.given_frames
                where = f"window {window.index + 1} of {len(windows)}"
                compute = partial(self._compute, window, current, overlap, where, before)
                self._draw_ahead(windows[window.index : window.index + 2])
                result, handed_over, before = self._retry(compute)
                if anchors:
                    current = self._inputs.first_given
                elif handed_over is not None:
                    current = handed_over
                yield result
        finally:
            self._noise.close()

    def _compute(
        self, window: Window, given: Tensor, overlap: int, where: str, before: Shown | None
    ) -> tuple[WindowResult, Tensor | None, Shown | None]:
        """One window, and on the device the given latents of the next one and what its pictures leave."""
        started = time.perf_counter()
        numbers = WindowNumbers(where, self._remedy, self._device)
        with self._recorder.stage("denoise"):
            latent = self.denoise(window, given, where)
            numbers.add("latents", latent)
        frames: list[np.ndarray] = []
        handed_over = next_given = tail = None
        shown: Shown | None = None
        if self._pixels is not None:
            with self._recorder.stage("vae_decode"):
                frames, tail, shown = self._pixels.decode(latent, window, overlap, numbers, before)
        if overlap and self._sampling.hand_over == "latents":
            handed_over = latent[:, :, -((overlap + 3) // 4) :].clone()
            next_given = download(handed_over)
        elif overlap:
            with self._recorder.stage("vae_encode"):
                encoded = None if self._pixels is None or tail is None else self._pixels.encode(tail)
                if encoded is not None and self._sampling.hand_over == "clean":
                    encoded = torch.cat(
                        [encoded, latent[:, :, latent.shape[2] - (overlap - 1) // 4 :]], dim=2
                    )
                shape = (1, latent.shape[1], (overlap + 3) // 4, *latent.shape[3:])
                handed_over = self._team.share(encoded if self._team.leads else None, shape, self._device)
                numbers.add("given latents of the next window", handed_over)
                next_given = download(handed_over)
        numbers.send()
        wait = partial(_arrived, self._arrival(self._device), numbers)
        kept = None if shown is None else shown.download()
        result = WindowResult(window, latent, frames, next_given, wait, started, kept)
        return result, handed_over, shown

    def _draw_ahead(self, windows: Sequence[Window]) -> None:
        """Draw this window's noises, and the next window's in the background while this one is computed."""
        if self._draw_noise is None:
            for window in windows:
                self._noise.prepare(window.index, self._latent_shape(window))

    def _noise_of(self, window: Window) -> DrawNoise:
        """The function that draws this window's noises."""
        shape = self._latent_shape(window)
        if self._draw_noise is not None:
            return self._draw_noise(window, shape)
        return self._noise.of(window.index, shape)

    def _latent_shape(self, window: Window) -> tuple[int, ...]:
        reference = self._reference.shape
        return (1, reference[1], window.latent_frames, *reference[3:])

    @torch.inference_mode()
    def denoise(self, window: Window, given: Tensor, where: str = "in a window") -> Tensor:
        """Denoise one window from its given latents (1, 16, G, h, w) to latents (1, 16, T, h, w) float32.

        - where: names the window in StoppedError.
        """
        sampling, dit = self._sampling, self._dit
        y, states = self._inputs.picture(window), self._inputs.states(window)
        cache = self._make_cache(self._run_blocks)
        timesteps = self._timesteps

        def velocity(sample: Tensor, step: int) -> Tensor:
            if self._stop is not None:
                end_if(self._stop(), f"before step {step + 1} of {len(sampling.schedule)} of {where}")

            if self._sparse is not None:
                self._sparse.step = step

            def predict(each: Pass) -> Tensor:
                text, audio = states[each.branch.name]
                run = self._team.shard(cache.runner(each))
                if self._sparse is not None:
                    run = self._sparse.ordered(run, self._always_ordered)
                return dit(
                    sample,
                    y,
                    timesteps[step : step + 1],
                    text,
                    audio,
                    run_blocks=run,
                )

            row = self._passes[step]
            total = torch.zeros_like(sample)
            for each, predicted in zip(row, self._velocities(row, predict, sample), strict=True):
                total = total.add_(predicted, alpha=each.branch.weight)
            return total

        def on_step(step: int, sample: Tensor) -> None:
            row = self._passes[step]
            self._recorder.event(
                StepFinished(
                    window=window.index,
                    step=step,
                    steps=len(sampling.schedule),
                    action="compute" if any(each.compute for each in row) else "reuse",
                    passes=len(row),
                )
            )
            if self._watch is not None:
                self._watch(window, step, sample)

        from_portrait = SAMPLERS.get(sampling.sampler).from_portrait
        return denoise_window(
            velocity,
            sampling.schedule,
            given,
            self._noise_of(window),
            sampling.sampler,
            on_step,
            self._inputs.start(window, given) if from_portrait else None,
        )
