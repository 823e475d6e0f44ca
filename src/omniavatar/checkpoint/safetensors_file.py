"""Reads a safetensors file: 8 bytes with the length of the header, a JSON header, the data.

The header gives dtype, shape and place of each tensor. It is checked against the length of the file before
any data is read: no gaps, no overlaps, no other types. Data is read directly into the new tensor.
Source of the format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniavatar.checkpoint.outside import open_weights, parse_table, reason_of, shown
from omniavatar.checkpoint.tensor_info import (
    MAX_AXES,
    SAFETENSORS_DTYPES,
    TensorInfo,
    check_name,
    damaged,
)
from omniavatar.errors import CheckpointError

MAX_HEADER_BYTES = 32 * 2**20
FIELDS = ("dtype", "shape", "data_offsets")


class SafetensorsFile:
    """A safetensors file; opening checks the header against the length of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_weights(path)
        try:
            self._offsets, self.index, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, int], dict[str, TensorInfo], dict[str, str]]:
        file_bytes = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(pread_all(self.path, self._file.fileno(), 8, 0), "little")
        if file_bytes < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise damaged(self.path, f"its header cannot be {length} bytes of {file_bytes}")
        try:
            header = parse_table(pread_all(self.path, self._file.fileno(), length, 8), "its header", "")
        except CheckpointError as error:
            raise damaged(self.path, str(error).rstrip("; ")) from None
        metadata = header.pop("__metadata__", {})
        if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
            raise damaged(self.path, "its metadata is not a table of texts")
        for key, entry in header.items():
            check_name(self.path, key)
            if type(entry) is not dict or any(field not in entry for field in FIELDS):
                raise damaged(self.path, f"the entry of {key} needs {', '.join(FIELDS)}")
            if not _are_sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
                raise damaged(self.path, f"the data of {key} has a wrong offset")
        offsets: dict[str, int] = {}
        index: dict[str, TensorInfo] = {}
        data_start = 8 + length
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            info = self._info(key, entry)
            start, stop = entry["data_offsets"]
            if start != end or stop - start != info.num_bytes:
                raise damaged(self.path, f"the data of {key} has a wrong offset or size")
            index[key], offsets[key], end = info, data_start + start, stop
        if data_start + end != file_bytes:
            raise damaged(self.path, f"it should have {data_start + end} bytes and has {file_bytes}")
        return offsets, index, metadata

    def _info(self, key: str, entry: dict[str, Any]) -> TensorInfo:
        name, shape = entry["dtype"], entry["shape"]
        dtype = SAFETENSORS_DTYPES.get(name) if type(name) is str else None
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {key} has the unsupported dtype {shown(str(name)[:100])}; "
                f"use one of {', '.join(SAFETENSORS_DTYPES)}"
            )
        if (
            not _are_sizes(shape)
            or len(shape) > MAX_AXES
            or math.prod(max(1, size) for size in shape) * dtype.itemsize >= 2**63
        ):
            raise damaged(self.path, f"{key} has an impossible shape")
        return TensorInfo(dtype, tuple(shape))

    def load(self, key: str) -> Tensor:
        info = self.index[key]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.num_bytes:
            self.read(key, 0, tensor.view(-1).view(torch.uint8))
        return tensor

    def read(self, key: str, start: int, out: Tensor) -> None:
        read_into(self.path, self._file.fileno(), key, self._offsets[key] + start, out)

    def close(self) -> None:
        self._file.close()


def read_into(path: Path, descriptor: int, key: str, offset: int, out: Tensor) -> None:
    """Fill `out` (uint8, on the CPU) from byte `offset` of a file. Raises CheckpointError."""
    target = memoryview(out.numpy().data)
    while target:
        try:
            count = os.preadv(descriptor, [target], offset)
        except OSError as error:
            raise CheckpointError(
                f"{path}: the data of {key} cannot be read ({reason_of(error)}); check the disk"
            ) from None
        if not count:
            raise damaged(path, f"the data of {key} ends early")
        target, offset = target[count:], offset + count


def pread_all(path: Path, descriptor: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes from `offset`; fewer only at the end of the file. Raises CheckpointError."""
    pieces = []
    try:
        while size > 0 and (piece := os.pread(descriptor, size, offset)):
            pieces.append(piece)
            size, offset = size - len(piece), offset + len(piece)
    except (OSError, OverflowError) as error:
        raise damaged(path, f"byte {offset} cannot be read: {reason_of(error)}") from None
    return b"".join(pieces)


def _are_sizes(value: object) -> bool:
    """Whether this is a list of integers from 0 to 2^63 - 1; true, 1.0 and "1" are none."""
    return type(value) is list and all(type(size) is int and 0 <= size < 2**63 for size in value)
