"""The loop of a block-causal model: blocks of a few latents, made from what the cache holds of earlier ones.

A block is denoised with fresh noise at every step (`sampling.samplers`, "causal"). One more pass at timestep
0 over the finished block then leaves its keys and values in the cache. The first latent of the video is the
portrait; nothing else is handed over. So a video has no end, and a block costs the same wherever it lies.
Positions count from the video's start. Their angles are computed for each block in float64, not looked up in
a table that ends. Only differences of positions act, so counting from elsewhere gives the same video.
Sources: LiveTalk (arXiv 2512.23576), Self Forcing (arXiv 2506.08009).

Shapes: T latents of a block, h w latent pixels, D audio width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omniavatar.accel.key_value_cache import KeyValueCache
from omniavatar.model.dit import AudioState, RunBlocks, TextState, WanDiT
from omniavatar.model.rope import rope_table
from omniavatar.sampling.causal import CausalWindow
from omniavatar.sampling.denoise import denoise
from omniavatar.sampling.schedule import Schedule
from omniavatar.sampling.windows import block_frames

CLEAN = 0.0
"""Timestep of the pass that writes the cache."""


class BlockGenerator:
    """Makes the blocks of one video in order; training makes those of B videos side by side.

    - reference_latent: (B, 16, 1, h, w) float32, the portrait; on the DiT's device. The engine has B = 1.
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
        self._grid = (window.block, height, width)
        tokens, videos = window.block * height * width, reference_latent.shape[0]
        self.cache = KeyValueCache(dit, window, tokens, dtype, device, videos)
        self._timesteps = torch.tensor((*schedule.timesteps, CLEAN), dtype=torch.float32, device=device)

    def audio_rows(self, block: int) -> int:
        """Audio vectors of block number `block`, one a frame."""
        return block_frames(block, self.window.block)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a block's latents, (B, 16, T, h, w)."""
        reference = self._reference.shape
        return (*reference[:2], self.window.block, *reference[3:])

    @torch.inference_mode()
    def make(
        self,
        audio_BND: Tensor | None,
        draw_noise: Callable[[], Tensor],
        on_step: Callable[[int, Tensor], None] | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents (1, 16, T, h, w) float32 of the next block.

        If an exception leaves this call, the block is not made; the next call makes it from its start.

        - audio_BND: (1, `audio_rows`, D), or None for a model without audio.
        - draw_noise: returns float32 noise of `shape`; called once for the start and once between two steps.
        - on_step: called with the number of each finished step, and its sample.
        - before_step: called with the number of each step, before it.
        """
        forward = self._forwards(audio_BND)

        def velocity(sample: Tensor, step: int) -> Tensor:
            if before_step is not None:
                before_step(step)
            return forward(sample, step)

        given = self._reference if self.done == 0 else self._reference[:, :, :0]
        latent = denoise(velocity, self._schedule, given, draw_noise, "causal", on_step)
        forward(latent, len(self._schedule))
        self.done += 1
        return latent

    @torch.inference_mode()
    def replay(self, audio_BND: Tensor | None, latent: Tensor, block: int | None = None) -> None:
        """Bring a block that was made before into the cache, without its steps.

        - block: its number; None for the next one. Blocks between are left out (`CausalWindow.deciding`).
        """
        self.done = self.done if block is None else block
        self._forwards(audio_BND)(latent, len(self._schedule))
        self.done += 1

    def _forwards(self, audio_BND: Tensor | None) -> Callable[[Tensor, int], Tensor]:
        """The velocity of the next block's sample at a step. What all its passes share is computed here."""
        audio, y, run_blocks = self._audio(audio_BND), self._condition(), self._runner()
        rope = rope_table(
            self._grid, self._dit.config.head_dim, self._reference.device, self.done * self.window.block
        )

        def forward(sample: Tensor, step: int) -> Tensor:
            timestep = self._timesteps[step : step + 1]
            return self._dit(sample, y, timestep, self.text, audio, run_blocks=run_blocks, rope=rope)

        return forward

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
