"""Reads one weight file tensor by tensor: safetensors, or PyTorch `.pth`/`.pt`/`.bin`.

The header gives dtype and shape of each tensor; data is read only by `load`. safetensors data is read
directly into the new tensor. A PyTorch file is mapped, and the mapping is renewed after each GiB read,
because mapped pages count as memory of the process. Loading therefore needs the result plus one tensor (plus
1 GiB for PyTorch files), never a second copy of the file.
Limits: a PyTorch file must hold a plain mapping of names to dense tensors. Pickled code is refused. PyTorch's
format before 2020 (not a zip file) cannot be mapped and is read whole.
Source of the format: https://github.com/huggingface/safetensors (8 bytes length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

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
MAX_HEADER_BYTES = 100_000_000
RENEW_MAPPING_BYTES = 1 << 30


@dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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


class SafetensorsFile:
    """A safetensors file; opening checks the header against the length of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self._offsets, self.index, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, int], dict[str, TensorInfo], dict[str, str]]:
        file_bytes = self.path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if file_bytes < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise _damaged(self.path, f"its header cannot be {length} bytes of {file_bytes}")
        try:
            header = json.loads(self._file.read(length))
        except ValueError:
            raise _damaged(self.path, "its header is not JSON") from None
        if not isinstance(header, dict):
            raise _damaged(self.path, "its header is not a table")
        metadata = header.pop("__metadata__", {})
        offsets: dict[str, int] = {}
        index: dict[str, TensorInfo] = {}
        data_start = 8 + length
        end = 0
        try:
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
            for key, entry in entries:
                dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
                if dtype is None:
                    raise CheckpointError(f"{self.path}: {key} has the unsupported dtype {entry['dtype']}")
                info = TensorInfo(dtype, tuple(int(size) for size in entry["shape"]))
                start, stop = entry["data_offsets"]
                if start != end or stop - start != info.num_bytes:
                    raise _damaged(self.path, f"the data of {key} has a wrong offset or size")
                index[key], offsets[key], end = info, data_start + start, stop
        except (KeyError, TypeError, IndexError, ValueError):
            raise _damaged(self.path, "its header has a malformed entry") from None
        if data_start + end != file_bytes:
            raise _damaged(self.path, f"it should have {data_start + end} bytes and has {file_bytes}")
        return offsets, index, metadata

    def load(self, key: str) -> Tensor:
        info = self.index[key]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.num_bytes:
            self.read(key, 0, tensor.view(-1).view(torch.uint8))
        return tensor

    def read(self, key: str, start: int, out: Tensor) -> None:
        target = memoryview(out.numpy().data)
        offset = self._offsets[key] + start
        while target:
            count = os.preadv(self._file.fileno(), [target], offset)
            if not count:
                raise _damaged(self.path, f"the data of {key} ends early")
            target, offset = target[count:], offset + count

    def close(self) -> None:
        self._file.close()


class TorchFile:
    """A `torch.save` file with a flat mapping of names to tensors; pickled code never runs."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02"):
                raise _damaged(path, "it was not written by torch.save")
        self._mappable = zipfile.is_zipfile(path)
        self._lock = threading.Lock()
        self._tensors: dict[str, Tensor] | None = self._map()
        self._bytes_read = 0
        self.index = {
            key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in self._tensors.items()
        }

    def _map(self) -> dict[str, Tensor]:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mappable)
        except pickle.UnpicklingError as error:
            raise self._refused(str(error)) from None
        except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            reason = str(error).strip().partition(". ")[0].splitlines() or ["it ends early"]
            raise _damaged(self.path, reason[0]) from None
        return self._checked(content)

    def _refused(self, reason: str) -> CheckpointError:
        named = re.search(r"GLOBAL ([\w.]+)", reason)
        what = f" ({named.group(1)})" if named else ""
        return CheckpointError(
            f"{self.path}: contains pickled code{what}, which is not run for safety; use a file of plain "
            "tensors (.safetensors, or a state dict saved by torch.save)"
        )

    def _checked(self, content: Any) -> dict[str, Tensor]:
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{self.path}: contains a {type(content).__name__}, not a mapping of names to tensors; "
                "save the model's plain state dict"
            )
        for key, value in content.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.path}: entry {key!r} is a {type(value).__name__}, not a tensor; "
                    "save the model's plain state dict"
                )
            if value.layout != torch.strided or value.device.type != "cpu":
                raise CheckpointError(
                    f"{self.path}: {key} is not a dense tensor with data; save the model's plain state dict"
                )
        return dict(content)

    def load(self, key: str) -> Tensor:
        return self._mapped(key, self.index[key].num_bytes).clone(memory_format=torch.contiguous_format)

    def read(self, key: str, start: int, out: Tensor) -> None:
        mapped = self._mapped(key, len(out)).contiguous().view(-1).view(torch.uint8)
        out.copy_(mapped[start : start + len(out)])

    def _mapped(self, key: str, used_bytes: int) -> Tensor:
        with self._lock:
            if self._tensors is None or (self._mappable and self._bytes_read > RENEW_MAPPING_BYTES):
                self._tensors = None
                self._tensors = self._map()
                self._bytes_read = 0
            self._bytes_read += used_bytes
            return self._tensors[key].detach()

    def close(self) -> None:
        self._tensors = None


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or incomplete ({why}); delete it and download it again")
