"""One endless video of a block-causal model: from audio vectors to frames, block after block.

The offline loop (`engine.block_windows`) and live sessions use it in the same way, so both draw the same
noise and make the same frames from the same audio vectors. The models belong to the pipeline; the cache, the
decoder's past and captured graphs belong to the video. Several videos of one pipeline take turns by block.

Shapes: T latents of a block, h w latent pixels, n frames, H W pixels, D audio width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omniavatar.accel.short_text import prepare_text
from omniavatar.device import arrival
from omniavatar.engine.block_loop import BlockGenerator
from omniavatar.engine.hold import BackgroundHold
from omniavatar.engine.numbers import WindowNumbers
from omniavatar.engine.piece_decoder import PieceDecoder
from omniavatar.engine.shown import Shown
from omniavatar.engine.window_loop import to_uint8
from omniavatar.errors import InputError
from omniavatar.sampling.denoise import noises_drawn
from omniavatar.sampling.noise import NoiseAhead
from omniavatar.sampling.windows import block_frames

if TYPE_CHECKING:
    from omniavatar.engine.window_loop import WindowSampling
    from omniavatar.model.dit import RunBlocks, WanDiT
    from omniavatar.model.vae import VideoDecoder

Past = Mapping[int, Tensor]
"""Latents (1, 16, T, h, w) of earlier blocks by their number."""
INDEPENDENT = (1, 0)
"""`noise_span` and `noise_white` of noise that is independent from latent to latent."""


class BlockVideo:
    """The blocks of one video in order.

    - decoder: None makes latents only.
    - text, reference_latent: of `types.Conditioning`.
    - past_latents: `accel.decoder.PictureDecoder.past_latents`.
    - dtype: of the cached keys and values.
    - embed: the text encoder, for `set_prompt`.
    - wrap: see `BlockGenerator`.
    - remedy: what to try if numbers are not finite, for the error.

    Raises ValueError if `sampling` has no `causal` window.
    """

    def __init__(
        self,
        dit: WanDiT,
        decoder: VideoDecoder | None,
        text: Tensor,
        reference_latent: Tensor,
        sampling: WindowSampling,
        fps: float,
        past_latents: int,
        dtype: torch.dtype,
        embed: Callable[[str], Tensor] | None = None,
        wrap: Callable[[RunBlocks], RunBlocks] = lambda run: run,
        arrival: Callable[[torch.device], Callable[[], None]] = arrival,
        remedy: str = "check the weight files",
    ) -> None:
        if sampling.causal is None:
            raise ValueError("the sampling has no window of a block-causal model")
        self._dit, self._embed, self._arrival, self._remedy = dit, embed, arrival, remedy
        self.window, self.seed, self.fps = sampling.causal, sampling.seed, fps
        self.noise_form = (sampling.noise_span, sampling.noise_white)
        self.device = reference_latent.device
        height, width = reference_latent.shape[3:]
        self.size = (8 * height, 8 * width)
        with torch.inference_mode():
            state = prepare_text(dit, text)
        self.generator = BlockGenerator(
            dit, reference_latent, state, sampling.schedule, self.window, dtype, wrap
        )
        draws = noises_drawn(sampling.schedule, sampling.sampler)
        self._noise = NoiseAhead(sampling.seed, self.device, draws, *self.noise_form)
        self.past_blocks = self.window.blocks_of(past_latents)
        self._decoder = None if decoder is None else PieceDecoder(decoder, self.past_blocks)
        self._numbers: WindowNumbers | None = None
        self._levels, self.shown = sampling.hold_background, Shown()

    @property
    def done(self) -> int:
        """Blocks made so far, which is the number of the next one."""
        return self.generator.done

    @property
    def audio_width(self) -> int:
        """D; 0 for a model without audio layers."""
        return self._dit.config.audio_dim

    @property
    def bytes_held(self) -> int:
        """Bytes of the cache on the device."""
        return self.generator.cache.num_bytes

    def frames_of(self, block: int) -> int:
        """Frames of block number `block`; the video's first latent is one frame, the others are four."""
        return block_frames(block, self.window.block)

    def make(
        self,
        audio_BND: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Latents (1, 16, T, h, w) float32 of the next block, on the device.

        The noise is that of (seed, number of the block). If an exception leaves this call, the block is not
        made and may be made again.

        - audio_BND: (1, `frames_of(done)`, D), a vector a frame; the video's first frame, the portrait, has
          zeros. None for a model without audio.
        - on_step: called with the number of each finished step, and its sample.
        - before_step: called with the number of each step, before it.
        """
        for block in (self.done, self.done + 1):
            self._noise.prepare(block, self.generator.shape)
        draw = self._noise.of(self.done, self.generator.shape)
        return self.generator.make(audio_BND, draw, on_step, before_step)

    def pixels(self, latent: Tensor) -> Iterator[Tensor]:
        """Pixels (1, 3, n, H, W) float32, about [-1, 1], of the next block's latents, in pieces."""
        if self._decoder is None:
            raise ValueError("this video was made without a decoder")
        return self._decoder(latent)

    @torch.inference_mode()
    def decode(self, latent: Tensor, numbers: WindowNumbers | None = None) -> Iterator[Tensor]:
        """`pixels` as they are shown, in [0, 1]; `numbers` gets them before they are clipped."""
        hold = None
        if self._levels:
            hold = BackgroundHold(self._levels, self.shown.reference, self.shown.weight)
        for piece in self.pixels(latent):
            if numbers is not None:
                numbers.add("pixels", piece)
            unit = to_unit(piece)
            if hold is not None:
                hold.apply(unit, 1 if hold.reference is not None else 0)
            yield unit
        if hold is not None:
            self.shown = Shown(None, hold.reference, hold.weight)

    def frames(self, latent: Tensor) -> list[np.ndarray]:
        """Frames (n, H, W, 3) uint8 of the next block's latents, in pieces.

        On CUDA the copies are only queued: read them after a function from `arrived` has returned.
        """
        numbers = WindowNumbers(f"block {self.done}", self._remedy, self.device)
        numbers.add("latents", latent)
        frames = [to_uint8(piece) for piece in self.decode(latent, numbers)]
        numbers.send()
        self._numbers = numbers
        return frames

    def arrived(self) -> Callable[[], None]:
        """A function that waits until the frames of the last `frames` call are on the host, in any thread.

        It raises NumbersError if their numbers are not finite.
        """
        wait, numbers = self._arrival(self.device), self._numbers

        def finish() -> None:
            wait()
            if numbers is not None:
                numbers.check()

        return finish

    def set_prompt(self, prompt: str) -> None:
        """Use another prompt from the next block on. Raises ValueError for a video without a text encoder."""
        if self._embed is None:
            raise ValueError("this video was made without a text encoder")
        text = self._embed(prompt)
        with torch.inference_mode():
            self.generator.text = prepare_text(self._dit, text)

    def go_on_after(
        self, past: Past, done: int, audio_of: Callable[[int], Tensor | None], shown: Shown | None = None
    ) -> None:
        """Bring cache and decoder to where they were when `done` blocks were made, to the bit.

        - past: at least the blocks that `needed` names.
        - audio_of: the audio vectors of a block, as for `make`.
        - shown: what was in `shown`.
        """
        self.shown = shown or Shown()
        for block in self.window.deciding(done, self._dit.config.num_layers):
            self.generator.replay(audio_of(block), past[block].to(self.device), block)
        self.generator.done = done
        if self._decoder is not None:
            newest = range(max(0, done - self.past_blocks), done)
            self._decoder.go_on_after(past[block].to(self.device) for block in newest)

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on later or elsewhere with the same models, on the host."""
        cache = self.generator.cache
        names = [(f"keys.{layer}", each) for layer, each in enumerate(cache.keys)]
        names += [(f"values.{layer}", each) for layer, each in enumerate(cache.values)]
        if self._decoder is not None and self._decoder.past:
            names.append(("past", torch.cat(tuple(self._decoder.past), dim=2)))
        values = {name: tensor.cpu().clone() for name, tensor in names}
        values |= {name: tensor.cpu().clone() for name, tensor in self.shown.tensors().items()}
        values |= {"done": torch.tensor(self.done), "seed": torch.tensor(self.seed)}
        if self.noise_form != INDEPENDENT:
            values |= {"noise_span": torch.tensor(self.noise_form)}
        return values

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Raises InputError if it belongs to another video."""
        cache, block = self.generator.cache, self.window.block
        targets = {f"keys.{layer}": each for layer, each in enumerate(cache.keys)}
        targets |= {f"values.{layer}": each for layer, each in enumerate(cache.values)}
        remedy = "use the state of a video with the same model, size, seed and settings"
        for name, target in targets.items():
            found = state.get(name)
            if found is None or found.shape != target.shape or found.dtype != target.dtype:
                raise InputError(f"state: {name} is missing or has another form; {remedy}")
            if not torch.isfinite(found).all():
                raise InputError(f"state: {name} holds numbers that are not finite; {remedy}")
        done, seed, past = (state.get(name) for name in ("done", "seed", "past"))
        if done is None or done.numel() != 1 or int(done) < 0:
            raise InputError(f"state: done is missing or is no number of blocks; {remedy}")
        if seed is None or seed.numel() != 1 or int(seed) != self.seed:
            raise InputError(f"state: seed is missing or differs; {remedy}")
        if tuple(state.get("noise_span", torch.tensor(INDEPENDENT)).flatten().tolist()) != self.noise_form:
            raise InputError(f"state: noise_span differs; {remedy}")
        if past is not None:
            of_block = torch.Size(self.generator.shape)
            if past.dim() != 5 or past.shape[2] % block or past[:, :, :block].shape != of_block:
                raise InputError(f"state: past has another form; {remedy}")
        shown = Shown.of(state) if self._levels else Shown()
        if shown.tensors() and (problem := shown.problem(self.size, False, True)):
            raise InputError(f"state: has {problem}; {remedy}")
        self.shown = shown
        with torch.inference_mode():
            for name, target in targets.items():
                target.copy_(state[name])
        self.generator.done = int(done)
        if self._decoder is not None:
            pieces = () if past is None else past.to(self.device).split(block, dim=2)
            self._decoder.go_on_after(pieces)

    def close(self) -> None:
        """Free the cache, the decoder's past and captured graphs. A closed video makes no more blocks."""
        self._noise.close()
        self._decoder = None
        del self.generator


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels of about [-1, 1], in place clipped to [0, 1]."""
    return pixels.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
