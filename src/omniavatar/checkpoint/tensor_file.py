"""Opens one weight file by its ending: safetensors, or PyTorch `.pth`/`.pt`/`.bin`/`.ckpt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from omniavatar.checkpoint.safetensors_file import SafetensorsFile
from omniavatar.checkpoint.tensor_info import TensorInfo
from omniavatar.checkpoint.torch_file import TorchFile
from omniavatar.errors import CheckpointError


class TensorFile(Protocol):
    """Interface of both formats. `index` has the order of the data; `load` returns a tensor with its own
    memory."""

    path: Path

    @property
    def index(self) -> Mapping[str, TensorInfo]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def load(self, key: str) -> Tensor: ...

    def read(self, key: str, start: int, out: Tensor) -> None: ...

    def close(self) -> None: ...


def open_tensor_file(path: Path) -> TensorFile:
    """The file at `path`, with its header read and checked. Raises CheckpointError."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return TorchFile(path)
    raise CheckpointError(f"{path}: unknown type of weight file; use .safetensors, .pth, .pt or a folder")
