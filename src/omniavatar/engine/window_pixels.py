"""A window's latents to shown frames, and what the next window starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omniavatar.engine.blend import SeamBlend, bytes_of, to_unit

if TYPE_CHECKING:
    from omniavatar.config.families import HandOver
    from omniavatar.engine.numbers import WindowNumbers
    from omniavatar.model.colour import ColourMatch
    from omniavatar.model.vae import VideoVAE
    from omniavatar.types import Window


class WindowPixels:
    """Decodes and encodes the windows of one request.

    - hand_over, color_match, blend_frames: see the settings.
    - portrait: as in `types.Conditioning`.
    - leads: only then are frames converted and blended.
    """

    def __init__(
        self,
        vae: VideoVAE,
        hand_over: HandOver,
        color_match: float,
        blend_frames: int,
        portrait: Tensor | None,
        device: torch.device,
        leads: bool,
        convert: Callable[[Tensor], np.ndarray],
    ) -> None:
        self._vae, self._device = vae, device
        self._hand_over, self._blend_frames = hand_over, blend_frames
        self._leads, self._convert = leads, convert
        self._colours: ColourMatch | None = None
        if color_match:
            from omniavatar.model.colour import ColourMatch

            assert portrait is not None
            unit = (portrait.to(device) + 1.0) / 2.0
            self._colours = ColourMatch.to(unit, color_match)

    @torch.inference_mode()
    def decode(
        self,
        latent: Tensor,
        window: Window,
        overlap: int,
        numbers: WindowNumbers,
        before: Tensor | None,
    ) -> tuple[list[np.ndarray], Tensor | None, Tensor | None]:
        """The window's new frames, converted on the leader only, what is encoded again, and the last frame.

        Its last `overlap` frames are encoded again as floats, or only the first of them. The last frame
        (1, 3, 1, H, W) uint8 is for the next window's blend, if there is one.

        - before: that frame of the window before.
        """
        blend = self._blend(window, overlap, before)
        skip = window.skipped_frames
        stop = skip + window.new_frames
        kept = window.length - overlap
        frames: list[np.ndarray] = []
        tail: list[Tensor] = []
        shown: Tensor | None = None
        first_used = skip if blend is None else skip - 1
        done = 0
        for piece in self._vae.decode_stream(latent):
            if self._leads:
                numbers.add("pixels", piece)
            pixels = piece.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
            count = pixels.shape[2]
            low, high = max(skip - done, 0), min(stop - done, count)
            if self._hand_over == "clean" and done <= kept < done + count:
                tail.append(pixels[:, :, kept - done : kept - done + 1].clone())
            used = max(min(first_used, kept) - done, 0)
            if self._colours is not None and used < count:
                pixels[:, :, used:] = self._colours(pixels[:, :, used:])
            if blend is not None:
                blend.apply(pixels, done)
            if low < high and self._leads:
                frames.append(self._convert(pixels[:, :, low:high]))
                if overlap and self._blend_frames and done + high == stop:
                    shown = bytes_of(pixels[:, :, high - 1 : high])
            if self._hand_over == "pixels" and done + count > kept:
                tail.append(pixels[:, :, max(kept - done, 0) :].clone())
            done += count
            if not overlap and done >= stop:
                break
        return frames, torch.cat(tail, dim=2) if tail else None, shown

    @torch.inference_mode()
    def encode(self, tail: Tensor) -> Tensor:
        """The given latents of the next window, of the floats that `decode` returned."""
        return self._vae.encode(tail * 2.0 - 1.0)

    def _blend(self, window: Window, overlap: int, before: Tensor | None) -> SeamBlend | None:
        """What changes the first new frames of `window`; the frames that are handed over stay as they are."""
        skip = window.skipped_frames
        frames = min(self._blend_frames, window.length - overlap - skip)
        if before is None or window.anchored or not skip or frames < 1:
            return None
        return SeamBlend(to_unit(before, self._device), skip, frames)
