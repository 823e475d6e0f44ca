"""Times the parts of one pipeline's windows on its device: forwards, decode, encode, writing, audio features.

Runs are synchronised and warmed up. Inputs are noise of the right sizes; the video encoder gets a drifting
portrait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from omniavatar.accel.short_text import prepare_text
from omniavatar.accel.vae import FastVAE
from omniavatar.accel.vae_runners import create_vae
from omniavatar.config.change import changed
from omniavatar.config.schema import PipelineConfig
from omniavatar.encoders.tokens import TEXT_TOKENS
from omniavatar.engine.block_session import block_sampling
from omniavatar.engine.host import Host
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.engine.prepare import (
    decide_steps,
    fitted_portrait,
    portrait_clip,
    shape_of,
)
from omniavatar.engine.segments import encode_once, encoders
from omniavatar.engine.window_loop import to_uint8
from omniavatar.measure.benchmark.whole import PROMPT, packaged_portrait
from omniavatar.measure.projection import Counts, StartCosts, Timing, WindowCosts
from omniavatar.measure.report import decoded_latents
from omniavatar.media.h264 import choose_encoder
from omniavatar.media.temporary import temporary_folder
from omniavatar.model.sizes import WINDOW_ROWS
from omniavatar.model.vae import WanVAE
from omniavatar.plan.calibration import find_constants
from omniavatar.plan.preview import assumed_scale, missing_files, with_family
from omniavatar.plan.run import RunPlan
from omniavatar.plan.sparsity import plan_sparse_run
from omniavatar.sampling.causal import CausalWindow

if TYPE_CHECKING:
    from omniavatar.config.schema import OutputConfig
    from omniavatar.model.dit import RunBlocks

AUDIO_SECONDS = 10
TEXT_WORDS = 64
"""Tokens of an ordinary prompt. The rest of the 512 is padding, which a CPU leaves out of attention."""
NOTHING = Timing(0.0, 0.0, 0.0, 0)
"""The time of a part that a video does not have."""


class PartTimer:
    """One pipeline, and the times of its parts."""

    def __init__(self, config: PipelineConfig, warm_up: int, repeats: int) -> None:
        self._config, self._warm_up, self._repeats = config, warm_up, repeats
        self._size = config.video.sizes[0]
        self._pipeline = AvatarPipeline.from_config(config)
        self._models = self._pipeline.models
        self._device = self._models.device
        self.warming = 0.0
        """Seconds that the first runs of the timed parts took beyond their medians."""

    @property
    def pipeline(self) -> AvatarPipeline:
        return self._pipeline

    def load(self) -> float:
        """Load every model of a window to where the configured memory places it. Returns seconds."""
        models = self._models
        self._place(self._pipeline)
        begun = time.perf_counter()
        models.dit, models.vae, models.audio_encoder  # noqa: B018  (loads them)
        self.wait()
        return time.perf_counter() - begun

    def embed_prompt(self) -> float:
        """Embed a prompt that no cache holds. Returns seconds, most of them for loading the encoder."""
        if not self._config.family.text:
            return 0.0
        with temporary_folder() as folder:
            fresh = AvatarPipeline.from_config(changed(self._config, runtime={"text_cache_dir": folder}))
            self._place(fresh)
            begun = time.perf_counter()
            fresh.models.prompts.embed([PROMPT])
            self.wait()
            return time.perf_counter() - begun

    def _place(self, pipeline: AvatarPipeline) -> None:
        """Decide where the models go, as a run does before it loads them."""
        pipeline.adopt(shape_of(pipeline.models, self._size, True))

    def plan(self, config: PipelineConfig, audio_seconds: float) -> RunPlan:
        """The plan of a video of `audio_seconds` seconds of audio, its steps decided."""
        video, models = config.video, self._models
        samples = round((audio_seconds + video.silence_duration_s) * video.sample_rate)
        constants = find_constants(config.model, config.sampling, models.dit_config)
        steps = decide_steps(models, config.sampling, constants)
        return plan_sparse_run(config, self._size, samples, models.dit_config, steps, models.sparse_limit)

    def _noise(self, *sizes: int) -> Tensor:
        return torch.randn(
            *sizes, generator=torch.Generator(self._device).manual_seed(0), device=self._device
        )

    @torch.inference_mode()
    def forward_timings(self, plan: RunPlan) -> dict[str, Timing]:
        """Times of a computed forward and of a skipped one, for a window of `plan`.

        With sparse attention also of a forward at the last step.
        """
        if plan.causal is not None:
            timings = self._block_timings(plan, plan.causal)
            return {name: timings[name] for name in ("forward", "skipped_forward")}
        dit, shape, noise = self._models.dit, latent_shape(plan), self._noise
        sample, y = noise(1, 16, *shape), noise(1, dit.config.in_dim - 16, *shape)
        width = dit.config.audio_dim
        if dit.config.audio_tokens:
            text = dit.prepare_audio_tokens(noise(1, plan.window_length, WINDOW_ROWS, width))
            audio = dit.prepare_audio(None)
        else:
            words = noise(1, TEXT_WORDS, dit.config.text_dim)
            text = prepare_text(dit, pad(words, (0, 0, 0, TEXT_TOKENS - TEXT_WORDS)))
            audio = dit.prepare_audio(noise(1, plan.window_length, width) if width else None)
        timestep = torch.tensor([800.0], device=self._device)
        residual: list[Tensor] = []

        def skip(tokens: Tensor, _: object) -> Tensor:
            if not residual:
                residual.append(torch.zeros_like(tokens))
            return tokens + residual[0]

        def seconds(run_blocks: RunBlocks | None) -> Timing:
            return self._timed(lambda: dit(sample, y, timestep, text, audio, run_blocks=run_blocks))

        timings = {"forward": seconds(None), "skipped_forward": seconds(skip)}
        sparse = self._models.sparse_steps(plan.sparsity)
        if sparse is not None and plan.sparsity is not None:
            sparse.step = plan.sparsity.sparse_steps[-1]
            timings["sparse_forward"] = seconds(sparse.ordered(sparse, always=False))
        return timings

    @torch.inference_mode()
    def _block_timings(self, plan: RunPlan, causal: CausalWindow) -> dict[str, Timing]:
        """Times of one pass of a block with a full cache, and of decoding a block; the rest takes none."""
        dit, noise = self._models.dit, self._noise
        video = self._pipeline.block_session().video(
            block_sampling(self._config.sampling, plan, self._config.video.hold_background),
            pad(noise(1, TEXT_WORDS, dit.config.text_dim), (0, 0, 0, TEXT_TOKENS - TEXT_WORDS)),
            noise(1, 16, 1, *latent_shape(plan)[1:]),
        )

        def make() -> Tensor:
            frames, width = video.frames_of(video.done), video.audio_width
            return video.make(noise(1, frames, width) if width else None)

        def decode() -> None:
            for piece in video.decode(latent):
                to_uint8(piece)

        for _ in range(
            causal.slots + causal.rolling + 1
        ):  # the cache fills, and each slot's forward is captured
            latent = make()
        passes = plan.steps + 1
        block = self._timed(make)
        forward = Timing(block.median / passes, block.fastest / passes, block.slowest / passes, block.repeats)
        decoding = self._timed(decode)
        video.close()
        return {"forward": forward, "skipped_forward": NOTHING, "decode": decoding, "encode": NOTHING}

    @torch.inference_mode()
    def window_timings(self, plan: RunPlan) -> dict[str, Timing]:
        """Times of forward, skipped forward, decode, encode and write, for a window of `plan`."""
        write = {"write": self.write_timing(plan)}
        if plan.causal is not None:
            return {**self._block_timings(plan, plan.causal), **write}
        return {**self.forward_timings(plan), **self.coding_timings(plan), **write}

    @torch.inference_mode()
    def coding_timings(self, plan: RunPlan, runner: str | None = None) -> dict[str, Timing]:
        """Times of decode and encode. runner: another way to run the VAE than the configured one."""
        vae, warming = self._models.vae, self.warming
        if runner is not None:
            plain = vae.plain if isinstance(vae, FastVAE) else vae
            assert isinstance(plain, WanVAE)
            vae = create_vae(runner, plain, self._device)
        sample = self._noise(1, 16, *latent_shape(plan))
        tail = self._noise(1, 3, max(1, plan.overlap), *plan.size).clamp_(-1, 1)

        def decode() -> None:
            for piece in vae.decode_stream(sample):
                to_uint8(piece.add_(1.0).div_(2.0).clamp_(0.0, 1.0))

        timings = {"decode": self._timed(decode), "encode": self._timed(lambda: vae.encode(tail))}
        if runner is not None:
            self.warming = warming
        return timings

    def write_timing(self, plan: RunPlan, preset: str | None = None) -> Timing:
        """Time of encoding a window's new frames. preset: another one than the configured one."""
        config = self._config if preset is None else changed(self._config, output={"preset": preset})
        output = config.output
        frames = _moving_portrait(plan.size, plan.window_length - plan.overlap)
        encoder = choose_encoder(output.encoder, plan.size)
        with temporary_folder() as folder:
            return self._timed(lambda: encode_once(frames, folder, output, plan, encoder, Host()))

    @torch.inference_mode()
    def start_timings(self) -> dict[str, Timing]:
        """Times of the portrait's encode and of the features of `AUDIO_SECONDS` of audio."""
        video = self._config.video
        plan = self.plan(self._config, AUDIO_SECONDS)
        pixels = portrait_clip(fitted_portrait(packaged_portrait(self._size), plan).to(self._device), plan)
        wave = np.random.default_rng(0).standard_normal(AUDIO_SECONDS * video.sample_rate).astype(np.float32)
        with temporary_folder() as folder:
            out = folder / "features.npy"

            def features() -> None:
                out.unlink(missing_ok=True)
                self._models.audio_features(wave * 0.1, plan, out)

            return {
                "portrait": self._timed(lambda: self._models.vae.encode(pixels)),
                "audio_features": self._timed(features),
            }

    def _timed(self, run: Callable[[], object]) -> Timing:
        times = []
        for _ in range(self._warm_up + self._repeats):
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - begun)
        timing = Timing.of(times[self._warm_up :])
        if self._warm_up:
            self.warming += max(0.0, times[0] - timing.median)
        return timing

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def with_weights(config: PipelineConfig) -> tuple[PipelineConfig, str | None]:
    """The configuration, with random weights of the same sizes if files are missing; then also a note."""
    config = with_family(config)
    missing = missing_files(config.model)
    if not missing:
        return config, None
    model = {"weights": "random", "scale": assumed_scale(config.model), "loras": ()}
    return changed(config, model=model), f"weights are not on this disk ({missing[0]}): random ones are used"


def latent_shape(plan: RunPlan) -> tuple[int, int, int]:
    """(T, h, w) of a window's latent."""
    return plan.latent_frames, plan.size[0] // 8, plan.size[1] // 8


def counts_of(plan: RunPlan) -> Counts:
    """The counts that a projection needs, from a plan whose steps are decided."""
    assert plan.step_plan is not None
    windows = len(plan.windows)
    last = decoded_latents(plan.windows[-1], last=True) / plan.latent_frames
    computed, skipped = plan.forwards // windows, plan.forwards_skipped // windows
    steps = () if plan.sparsity is None else plan.sparsity.sparse_steps
    sparse = sum(each.compute for step in steps for each in plan.passes[step])
    return Counts(windows, computed, skipped, last, plan.duration_s, sparse)


def window_costs(timings: dict[str, Timing], plan: RunPlan, output: OutputConfig) -> WindowCosts:
    """Medians of `PartTimer.window_timings` of a plan."""
    medians = {name: timing.median for name, timing in timings.items()}
    host = Host()
    at_once = encoders(output, plan, choose_encoder(output.encoder, plan.size), host)
    return WindowCosts(**medians, writers=max(1, min(host.encoders, at_once)))


def start_costs(timings: dict[str, Timing]) -> StartCosts:
    """Medians of `PartTimer.start_timings`."""
    return StartCosts(timings["portrait"].median, timings["audio_features"].median / AUDIO_SECONDS)


def _moving_portrait(size: tuple[int, int], count: int) -> np.ndarray:
    """(count, H, W, 3) uint8: the packaged portrait drifting sideways, about as hard to encode as a face."""
    still = packaged_portrait(size)
    return np.stack([np.roll(still, shift, axis=1) for shift in range(count)])
