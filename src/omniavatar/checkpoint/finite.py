"""Finds weights that are NaN or infinite, also those that become so in the dtype they are cast to.

A NaN in one weight turns every frame after the first black. Each tensor is summed once on its device: a sum
of finite numbers is finite, unless they are huge. A GPU is not stopped for each tensor: its sums are read
once at the end. On a CPU, a thread sums one tensor while the next is read. Only a tensor with a suspicious
sum is looked at number by number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.errors import CheckpointError

Part = tuple[TensorFiles, str]
"""A stored tensor: its files and its name in them."""
FLOAT8_LIMITS = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
"""The bits without sign from which a float8 number is NaN or infinite."""
PIECE = 1 << 22
SMALL_BYTES = 1 << 20
"""Smaller tensors are summed at once: a thread costs more."""


class FiniteCheck:
    """Checks the weights of one model; `finish` raises the error. A context manager that owns a thread.

    origin: name of the files in the error, if a weight has no parts.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="finite")
        self._on_device: dict[torch.device, list[tuple[str, Sequence[Part], Tensor]]] = {}
        self._in_thread: list[tuple[str, Sequence[Part], Future[Tensor]]] = []
        self._suspicious: list[tuple[str, Sequence[Part]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, name: str, tensor: Tensor, parts: Sequence[Part]) -> None:
        """Sum up `tensor` on its device; `parts` are the stored tensors that it is made of."""
        if not tensor.is_floating_point() or not tensor.numel():
            return
        if tensor.device.type != "cpu":
            self._on_device.setdefault(tensor.device, []).append((name, parts, _sum(tensor)))
        elif tensor.nbytes > SMALL_BYTES:
            self._in_thread.append((name, parts, self._pool.submit(_sum, tensor)))
        elif not math.isfinite(_sum(tensor)):
            self._suspicious.append((name, parts))

    def finish(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError for the first weight that is not finite.

        tensors: the weights by name, to look at again where the sum is suspicious.
        """
        for found in self._on_device.values():
            finite = torch.stack([total for _, _, total in found]).isfinite().tolist()
            self._suspicious += [each[:2] for each, good in zip(found, finite, strict=True) if not good]
        self._suspicious += [each[:2] for each in self._in_thread if not math.isfinite(each[2].result())]
        for name, parts in self._suspicious:
            require_finite(name, tensors[name], parts, self._origin)


def require_finite(name: str, tensor: Tensor, parts: Sequence[Part], origin: str) -> None:
    """Check one tensor now; arguments as in `FiniteCheck`. Raises CheckpointError."""
    if not is_finite(tensor):
        raise _error(name, tensor.dtype, parts, origin)


def _error(name: str, dtype: torch.dtype, parts: Sequence[Part], origin: str) -> CheckpointError:
    for files, key in parts:
        if not is_finite(files.load(key)):
            return CheckpointError(
                f"{files.path_of(key)}: {key} holds NaN or infinite numbers, which make the frames black; "
                "download the file again, or leave it out if it is a LoRA"
            )
    short = str(dtype).removeprefix("torch.")
    limit = f"{short} holds numbers up to {torch.finfo(dtype).max:.3g}"
    remedy = "set dtype=bfloat16" if dtype in (torch.float16, *FLOAT8_LIMITS) else "use another file"
    if len(parts) > 1:
        remedy += ", or lower the strength of the LoRAs"
    where = parts[0][0].path_of(parts[0][1]) if parts else origin
    return CheckpointError(f"{where}: {name} is not finite in the model ({limit}); {remedy}")


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite; integers are."""
    if not tensor.is_floating_point() or not tensor.numel() or bool(_sum(tensor).isfinite()):
        return True
    if tensor.dtype in FLOAT8_LIMITS:
        return False
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(PIECE))


def _sum(tensor: Tensor) -> Tensor:
    """A number on the device of `tensor`, finite only if all its numbers are."""
    tensor = tensor.detach()
    if tensor.dtype in FLOAT8_LIMITS:
        bits = tensor.view(torch.uint8).bitwise_and(0x7F).amax()
        return torch.where(bits >= FLOAT8_LIMITS[tensor.dtype], torch.inf, 0.0)
    # On a CPU, a sum in another dtype than the tensor's is 30 times slower.
    return tensor.sum() if tensor.device.type == "cpu" else tensor.sum(dtype=torch.float32)
