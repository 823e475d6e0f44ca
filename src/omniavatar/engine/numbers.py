"""Whether the numbers of a window are finite, found on the device and read with its pixels.

Half precision overflows, and one NaN in a weight reaches every number: the frames would be black. The largest
magnitude of each part is one reduction that reads the part once. NaN and infinity pass through it. Its result
is downloaded with the pixels, so the host does not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniavatar.device import download
from omniavatar.errors import NumbersError

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig


def largest(values: Tensor) -> Tensor:
    """The largest magnitude of `values`, as a float32 scalar on their device; NaN if one is NaN."""
    return torch.linalg.vector_norm(values, float("inf")).float()


class WindowNumbers:
    """The parts of one window that are computed so far.

    - where: names the window in the error, such as `window 2 of 5`.
    - remedy: what to try, for the error.
    """

    def __init__(self, where: str, remedy: str, device: torch.device) -> None:
        self._where, self._remedy, self._device = where, remedy, device
        self._names: list[str] = []
        self._largest: list[Tensor] = []
        self._arriving: list[Tensor] | None = None

    def add(self, name: str, values: Tensor) -> None:
        """Queue the check of a part. On the CPU it is checked now. Raises NumbersError."""
        self._names.append(name)
        self._largest.append(largest(values))
        if self._device.type == "cpu":
            self._raise_for(self._largest[-1:], [name])

    def send(self) -> None:
        """Queue the download of the results."""
        places: dict[torch.device, list[int]] = {}
        for index, each in enumerate(self._largest):
            places.setdefault(each.device, []).append(index)
        arriving = [torch.empty(())] * len(self._largest)
        for indices in places.values():  # the VAE may lie on another device
            results = download(torch.stack([self._largest[index] for index in indices]))
            for index, result in zip(indices, results, strict=True):
                arriving[index] = result
        self._arriving = arriving

    def check(self) -> None:
        """Raise NumbersError if a part is not finite. `send` must have arrived."""
        assert self._arriving is not None
        self._raise_for(self._arriving, self._names)

    def _raise_for(self, results: list[Tensor], names: list[str]) -> None:
        for name, result in zip(names, results, strict=True):
            if not torch.isfinite(result):
                raise NumbersError(
                    f"{self._where}: the {name} hold numbers that are not finite; "
                    f"nothing of this window is kept; {self._remedy}"
                )


def remedy(config: PipelineConfig, attention: str, quantize: str) -> str:
    """What to try after numbers overflowed, by what this run uses.

    - attention, quantize: the backends in use.
    """
    from omniavatar.accel.attention.registry import ATTENTION

    model = config.model
    tries = ["dtype=bf16 instead of fp16"] if model.dtype == "fp16" else []
    tries += [f"leave out the LoRA {lora.path.name} or lower its strength" for lora in model.loras]
    tries += ["quantize=none"] if quantize != "none" else []
    tries += ["attention=sdpa"] if not ATTENTION.get(attention).exact else []
    tries += ["step_cache=none"] if config.sampling.cache_policy != "none" else []
    if not tries:
        return "check that the weight files are whole and belong together"
    return f"try: {', '.join(tries)}; or check that the weight files are whole"
