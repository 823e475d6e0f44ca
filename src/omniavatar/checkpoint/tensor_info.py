"""What the header of a weight file says about one tensor, and what both formats refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from omniavatar.checkpoint.outside import shown
from omniavatar.errors import CheckpointError

SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_NAME, MAX_AXES = 1000, 16


@dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_name(path: Path, name: object) -> None:
    """Raise CheckpointError unless `name` can be the name of a tensor and be printed."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        text = shown(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise CheckpointError(
            f"{path}: a tensor has an impossible name ({text or 'empty'}); use a file of plain tensors"
        )


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that was cut or changed."""
    return CheckpointError(f"{path}: damaged or incomplete ({why}); delete it and download it again")
