"""The loop of a block-causal model: blocks of a few latents, made from what the cache holds of earlier ones.

A block is denoised with fresh noise at every step (`sampling.samplers`, "renoise"). One more pass at timestep
0 over the finished block then leaves its keys and values in the cache. The first latent of the video is the
portrait; nothing else is handed over. So a video has no end, and a block costs the same wherever it lies.
Sources: LiveTalk (arXiv 2512.23576), Self Forcing (arXiv 2506.08009).

Shapes: T latents of a block, h w latent pixels, D audio width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omniavatar.accel.key_value_cache import KeyValueCache
from omniavatar.model.dit import AudioState, RunBlocks, TextState, WanDiT
from omniavatar.model.sizes import FRAMES_PER_LATENT
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.denoise import denoise
from omniavatar.sampling.schedule import Schedule

CLEAN = 0.0
"""Timestep of the pass that writes the cache."""


class BlockGenerator:
    """Makes the blocks of one video in order.

    - reference_latent: (1, 16, 1, h, w) float32, the portrait; on the DiT's device.
    - text: from `WanDiT.prepare_text`.
    - dtype: of the cached keys and values.
    - wrap: applied once to each function that runs the DiT's blocks with a full cache, such as
      `accel.graphs.GraphedBlocks`. There is one for each slot that is written over and over.
    """

    def __init__(
        self,
        dit: WanDiT,
        reference_latent: Tensor,
        text: TextState,
        schedule: Schedule,
        window: CausalWindow,
        dtype: torch.dtype,
        wrap: Callable[[RunBlocks], RunBlocks] = lambda run: run,
    ) -> None:
        self._dit, self._reference, self._schedule, self._wrap = dit, reference_latent, schedule, wrap
        self._runners: dict[tuple[int, int], RunBlocks] = {}
        self.text, self.window = text, window
        self.done = 0
        device = reference_latent.device
        _, patch_height, patch_width = dit.config.patch_size
        height, width = reference_latent.shape[3] // patch_height, reference_latent.shape[4] // patch_width
        self.cache = KeyValueCache(dit, window, window.block * height * width, dtype, device)
        self._timesteps = torch.tensor((*schedule.timesteps, CLEAN), dtype=torch.float32, device=device)

    def audio_rows(self, block: int) -> int:
        """Audio vectors of block number `block`: the first latent of the video stands for one frame."""
        return FRAMES_PER_LATENT * self.window.block - (0 if block else FRAMES_PER_LATENT - 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a block's latents, (1, 16, T, h, w)."""
        reference = self._reference.shape
        return (1, reference[1], self.window.block, *reference[3:])

    @torch.inference_mode()
    def make(
        self,
        audio_BND: Tensor | None,
        draw_noise: Callable[[], Tensor],
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents (1, 16, T, h, w) float32 of the next block.

        - audio_BND: (1, `audio_rows`, D), or None for a model without audio.
        - draw_noise: returns float32 noise of `shape`; called once for the start and once between two steps.
        """
        audio, y = self._audio(audio_BND), self._condition()
        given = self._reference if self.done == 0 else self._reference[:, :, :0]
        latent = denoise(
            lambda sample, step: self._forward(sample, y, step, audio),
            self._schedule,
            given,
            draw_noise,
            "renoise",
            on_step,
        )
        self._forward(latent, y, len(self._schedule), audio)
        self.done += 1
        return latent

    @torch.inference_mode()
    def replay(self, audio_BND: Tensor | None, latent: Tensor) -> None:
        """Bring a block that was made before into the cache, without its steps."""
        self._forward(latent, self._condition(), len(self._schedule), self._audio(audio_BND))
        self.done += 1

    def _forward(self, sample: Tensor, y: Tensor, step: int, audio: AudioState) -> Tensor:
        return self._dit(
            sample,
            y,
            self._timesteps[step : step + 1],
            self.text,
            audio,
            run_blocks=self._runner(),
            first_frame=self.done * self.window.block,
        )

    def _runner(self) -> RunBlocks:
        """Runs the DiT's blocks for the block in hand; the same function for the same slots."""
        slot, filled = self.window.slot(self.done), self.window.filled(self.done)
        if (slot, filled) not in self._runners:
            run = self.cache.runner(self._dit, self.done)
            self._runners[slot, filled] = self._wrap(run) if filled == self.window.slots else run
        return self._runners[slot, filled]

    def _audio(self, audio_BND: Tensor | None) -> AudioState:
        needed = self.audio_rows(self.done)
        if audio_BND is not None and audio_BND.shape[1] != needed:
            raise ValueError(f"block {self.done} needs {needed} audio vectors, not {audio_BND.shape[1]}")
        return self._dit.prepare_audio(audio_BND, continued=self.done > 0)

    def _condition(self) -> Tensor:
        """y (1, 17, T, h, w): the portrait on every latent; the mask gives only the video's first one."""
        repeated = self._reference.expand(self.shape)
        mask = torch.ones_like(repeated[:, :1])
        if self.done == 0:
            mask[:, :, 0] = 0
        return torch.cat([repeated, mask], dim=1)
