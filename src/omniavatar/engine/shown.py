"""What the pictures shown so far leave for the next ones, beside the given latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omniavatar.device import download

NAMES = {"last": "shown", "reference": "held_at", "weight": "held"}
"""Names of the fields in hand-over files and saved sessions."""


@dataclass(frozen=True, eq=False)
class Shown:
    """Fields are None where no setting needs them.

    - last: the frame shown last, (1, 3, 1, H, W) uint8 (`blend_frames`).
    - reference: the frame that the background is held at, as `last` (`hold_background`).
    - weight: how much each cell of the last frame is held, (1, 1, h, w) float32 (`hold_background`).
    """

    last: Tensor | None = None
    reference: Tensor | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Shown:
        """Of what `tensors` returned; other entries are ignored."""
        return cls(**{field: tensors.get(name) for field, name in NAMES.items()})

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are not None, by NAMES."""
        found = {name: getattr(self, field) for field, name in NAMES.items()}
        return {name: value for name, value in found.items() if value is not None}

    def download(self) -> Shown:
        """This on the host; the copies are only queued, as `device.download` says."""
        return Shown.of({name: download(value) for name, value in self.tensors().items()})

    def problem(self, size: tuple[int, int], last: bool, held: bool) -> str | None:
        """Why this is not of pictures of `size` (H, W), as the end of a sentence; None if it is.

        last, held: which fields must be there.
        """
        from omniavatar.engine.hold import cells

        wide = f"{size[1]}x{size[0]} pixels"
        wanted = (1, 3, 1, *size)
        if last and not _is(self.last, wanted, torch.uint8):
            return f"no last frame of {wide}"
        if held and not _is(self.reference, wanted, torch.uint8):
            return f"no first frame of {wide}"
        if held and not _is(self.weight, (1, 1, *cells(*size)), torch.float32):
            return f"no weights of the background of {wide}"
        return None


def left(given: Tensor | None, shown: Shown | None) -> dict[str, Tensor]:
    """What a window leaves for the next one, by the names of hand-over files and saved sessions."""
    entries = {} if given is None else {"given": given}
    return entries if shown is None else {**entries, **shown.tensors()}


def _is(found: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    if found is None or found.dtype != dtype or found.shape != torch.Size(shape):
        return False
    return not dtype.is_floating_point or bool(((found >= 0) & (found <= 1)).all())
