"""A window's latents to shown frames, and what the next window starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omniavatar.engine.blend import SeamBlend, bytes_of, to_unit
from omniavatar.engine.hold import BackgroundHold
from omniavatar.engine.shown import Shown

if TYPE_CHECKING:
    from omniavatar.config.families import HandOver
    from omniavatar.engine.numbers import WindowNumbers
    from omniavatar.model.colour import ColourMatch
    from omniavatar.model.vae import VideoVAE
    from omniavatar.types import Window


class WindowPixels:
    """Decodes and encodes the windows of one request.

    - hand_over, color_match, blend_frames, hold_background: see the settings.
    - portrait: as in `types.Conditioning`.
    - leads: only then are frames converted.
    """

    def __init__(
        self,
        vae: VideoVAE,
        hand_over: HandOver,
        color_match: float,
        blend_frames: int,
        hold_background: float,
        portrait: Tensor | None,
        device: torch.device,
        leads: bool,
        convert: Callable[[Tensor], np.ndarray],
    ) -> None:
        self._vae, self._device = vae, device
        self._hand_over, self._blend_frames, self._levels = hand_over, blend_frames, hold_background
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
        before: Shown | None,
    ) -> tuple[list[np.ndarray], Tensor | None, Shown | None]:
        """The window's new frames, converted on the leader only, what is encoded again, and what is left.

        Its last `overlap` frames are encoded again as floats, or only the first of them.

        - before: what the pictures of the window before left, on any device.
        """
        blend, hold = self._blend(window, overlap, before), self._hold(window, before)
        skip = window.skipped_frames
        stop = skip + window.new_frames
        kept = window.length - overlap
        frames: list[np.ndarray] = []
        tail: list[Tensor] = []
        last: Tensor | None = None
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
            if hold is not None and low < count:
                hold.apply(pixels[:, :, low:], done + low)
            if overlap and self._blend_frames and low < high and done + high == stop:
                last = bytes_of(pixels[:, :, high - 1 : high])
            if low < high and self._leads:
                frames.append(self._convert(pixels[:, :, low:high]))
            if self._hand_over == "pixels" and done + count > kept:
                tail.append(pixels[:, :, max(kept - done, 0) :].clone())
            done += count
            if not overlap and done >= stop:
                break
        shown: Shown | None = None
        if overlap and hold is not None:
            shown = Shown(last, hold.reference, hold.weight)
        elif last is not None:
            shown = Shown(last)
        return frames, torch.cat(tail, dim=2) if tail else None, shown

    @torch.inference_mode()
    def encode(self, tail: Tensor) -> Tensor:
        """The given latents of the next window, of the floats that `decode` returned."""
        return self._vae.encode(tail * 2.0 - 1.0)

    def _blend(self, window: Window, overlap: int, before: Shown | None) -> SeamBlend | None:
        """What changes the first new frames of `window`; the frames that are handed over stay as they are."""
        skip = window.skipped_frames
        frames = min(self._blend_frames, window.length - overlap - skip)
        if before is None or before.last is None or window.anchored or not skip or frames < 1:
            return None
        return SeamBlend(to_unit(before.last, self._device), skip, frames)

    def _hold(self, window: Window, before: Shown | None) -> BackgroundHold | None:
        """What holds the background; an anchored window takes a new first frame."""
        if not self._levels:
            return None
        if before is None or window.anchored:
            return BackgroundHold(self._levels)
        return BackgroundHold(self._levels, before.reference, before.weight)
