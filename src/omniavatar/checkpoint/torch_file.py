"""Reads a file of `torch.save`: a mapping of names to tensors, as a zip of raw records or in the older form.

The zip's own table is checked first: records are stored, do not overlap, and lie inside the file. torch gets
only the pickle, in a zip of our own with empty records, and makes tensors without data (`weights_only`,
meta), so no code runs. The place of an empty record tells which record a tensor belongs to; it must have
exactly the tensor's size. Data is read from the file directly into the new tensor.

`{"state_dict": {...}}` and its relatives (`WRAPPERS`) are opened. The form before 2020 (no zip) is read
whole. Refused: pickled code, TorchScript, compressed records, big-endian data, sparse, quantised, complex and
expanded tensors, and the tar files of 2016.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from omniavatar.checkpoint.outside import open_weights, reason_of, shown
from omniavatar.checkpoint.safetensors_file import pread_all, read_into
from omniavatar.checkpoint.tensor_info import SAFETENSORS_DTYPES, TensorInfo, check_name, damaged
from omniavatar.errors import CheckpointError

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02"
LEGACY_PICKLES = 5
"""The older form: a magic number, a version, the machine, the tensors, and the names of the data blocks."""
MAX_PICKLE_BYTES = 64 * 2**20
MAX_RECORDS = 200_000
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "module", "model", "params", "weights")
"""Names under which training tools put the state dict into a larger table."""
PLAIN = "save the model's plain state dict"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class _Place:
    """Where the elements of a tensor are: from byte `offset` of the file, with these strides (elements)."""

    offset: int
    strides: tuple[int, ...]
    span: int
    """Number of elements from the first to the last."""


class TorchFile:
    """A `torch.save` file with a mapping of names to tensors; pickled code never runs."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole: dict[str, Tensor] = {}
        self._places: dict[str, _Place] = {}
        self._file = open_weights(path)
        try:
            start = pread_all(path, self._file.fileno(), 4, 0)
            if start == ZIP:
                records = self._records()
                index, names = self._index(records)
                tensors = self._checked(self._unpickled(index, "meta"))
                self._places = {
                    key: self._place(key, tensor, names, records) for key, tensor in tensors.items()
                }
            elif start[:2] == LEGACY:
                with path.open("rb") as file:
                    tensors = self._whole = self._checked(self._unpickled(file, "cpu"))
                self._check_filled(tensors)
            else:
                raise damaged(path, "it was not written by torch.save")
        except BaseException:
            self._file.close()
            raise
        self.index = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}

    def _records(self) -> dict[str, tuple[int, int]]:
        """Place and size of each record, by its name without the folder of the archive."""
        descriptor = self._file.fileno()
        length = os.fstat(descriptor).st_size
        try:
            with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        except Exception as error:  # zipfile raises many classes for a damaged table
            raise damaged(self.path, f"its list of records is unreadable: {reason_of(error)}") from None
        if len(entries) > MAX_RECORDS or len({entry.filename for entry in entries}) != len(entries):
            raise damaged(self.path, "it has too many records, or two of one name")
        records: dict[str, tuple[int, int]] = {}
        end = 0
        for entry in entries:
            name = shown(entry.filename)
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise damaged(self.path, f"the record {name} is compressed, which torch.save never does")
            header = pread_all(self.path, descriptor, _LOCAL_HEADER.size, entry.header_offset)
            if len(header) < _LOCAL_HEADER.size or header[:4] != ZIP or entry.header_offset < end:
                raise damaged(self.path, f"the record {name} is not at its place")
            *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            start = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            end = start + entry.file_size
            if end > length or entry.flag_bits & 1:
                raise damaged(self.path, f"the record {name} ends early or is encrypted")
            records[entry.filename.partition("/")[2]] = start, entry.file_size
        if "constants.pkl" in records:
            raise CheckpointError(f"{self.path}: is a TorchScript program; {PLAIN}")
        if "data.pkl" not in records or records["data.pkl"][1] > MAX_PICKLE_BYTES:
            raise damaged(self.path, "it has no table of tensors, or one of more than 64 MiB")
        if "byteorder" in records and self._bytes(*records["byteorder"]) != b"little":
            raise CheckpointError(f"{self.path}: has big-endian numbers; save it on another machine")
        return records

    def _bytes(self, start: int, size: int) -> bytes:
        return pread_all(self.path, self._file.fileno(), min(size, MAX_PICKLE_BYTES), start)

    def _index(self, records: Mapping[str, tuple[int, int]]) -> tuple[io.BytesIO, dict[int, str]]:
        """A file of torch.save with the same pickle and empty records; and their names by their places."""
        content, names = io.BytesIO(), {}
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("a/version", b"3\n")
            archive.writestr("a/byteorder", b"little")
            archive.writestr("a/data.pkl", self._bytes(*records["data.pkl"]))
            for name in records:
                if name.startswith("data/") and name.isascii():
                    names[content.tell() + _LOCAL_HEADER.size + len(f"a/{name}")] = name
                    archive.writestr(f"a/{name}", b"")
        content.seek(0)
        return content, names

    def _unpickled(self, file: BinaryIO, device: str) -> Any:
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise self._refused(str(error)) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise damaged(self.path, reason_of(error).partition(". ")[0]) from None

    def _refused(self, reason: str) -> CheckpointError:
        named = re.search(r"GLOBAL ([\w.]+)", reason)
        if named is None and "nsupported" not in reason:
            return damaged(self.path, shown(reason.strip().partition("\n")[0]) or "its pickle is broken")
        what = f" ({shown(named.group(1))})" if named else ""
        return CheckpointError(
            f"{self.path}: contains pickled code{what}, which is not run for safety; use a file of plain "
            "tensors (.safetensors, or a state dict saved by torch.save)"
        )

    def _checked(self, content: Any) -> dict[str, Tensor]:
        content = _unwrapped(content)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"{self.path}: contains a {type(content).__name__}, not a mapping of names to "
                f"tensors; {PLAIN}"
            )
        for key, value in content.items():
            check_name(self.path, key)
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{self.path}: entry {shown(key)!r} is a {type(value).__name__}, not a tensor; {PLAIN}"
                )
            if value.layout != torch.strided or value.dtype not in SAFETENSORS_DTYPES.values():
                kind = value.dtype if value.layout == torch.strided else value.layout
                raise CheckpointError(f"{self.path}: {key} is a tensor of {kind}; {PLAIN}")
        return {key: value.detach() for key, value in content.items()}

    def _check_filled(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if the older form lacks the data of a tensor: torch keeps random memory."""
        keys: set[object] = set()
        with self.path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                keys = {argument for _, argument, _ in pickletools.genops(file) if isinstance(argument, str)}
        if len(keys) < len({tensor.untyped_storage()._cdata for tensor in tensors.values()}):
            raise damaged(self.path, "it lacks the data of some tensors")

    def _place(
        self,
        key: str,
        tensor: Tensor,
        names: Mapping[int, str],
        records: Mapping[str, tuple[int, int]],
    ) -> _Place:
        storage = tensor.untyped_storage()
        name = names.get(getattr(storage, "_checkpoint_offset", -1))
        if name is None:
            raise CheckpointError(f"{self.path}: {key} is not a dense tensor with data; {PLAIN}")
        item, (start, size) = tensor.dtype.itemsize, records[name]
        strides, first = tensor.stride(), int(tensor.storage_offset())
        if not storage.nbytes() <= size < storage.nbytes() + item:
            raise damaged(self.path, f"{key} needs {storage.nbytes()} bytes, its record has {size}")
        if not tensor.numel():
            return _Place(start, strides, 0)
        steps = [(count - 1) * stride for count, stride in zip(tensor.shape, strides, strict=True)]
        span = 1 + sum(int(step) for step in steps)
        if min((*strides, first, 0)) < 0 or (first + span) * item > size:
            raise damaged(self.path, f"{key} reaches beyond its record")
        if tensor.numel() > span:
            raise CheckpointError(f"{self.path}: {key} repeats the same numbers (expanded); {PLAIN}")
        return _Place(start + first * item, strides, span)

    def load(self, key: str) -> Tensor:
        if self._whole:
            return self._whole[key].clone(memory_format=torch.contiguous_format)
        info, place = self.index[key], self._places[key]
        if place.span == math.prod(info.shape) and _is_contiguous(info.shape, place.strides):
            tensor = torch.empty(info.shape, dtype=info.dtype)
            if info.num_bytes:
                self._read(key, place.offset, tensor.view(-1).view(torch.uint8))
            return tensor
        around = torch.empty(place.span, dtype=info.dtype)
        self._read(key, place.offset, around.view(torch.uint8))
        return around.as_strided(info.shape, place.strides).clone(memory_format=torch.contiguous_format)

    def read(self, key: str, start: int, out: Tensor) -> None:
        if key in self._places and _is_contiguous(self.index[key].shape, self._places[key].strides):
            self._read(key, self._places[key].offset + start, out)
        else:
            out.copy_(self.load(key).view(-1).view(torch.uint8)[start : start + len(out)])

    def _read(self, key: str, offset: int, out: Tensor) -> None:
        read_into(self.path, self._file.fileno(), key, offset, out)

    def close(self) -> None:
        self._whole = {}
        self._file.close()


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _unwrapped(content: Any) -> Any:
    """The mapping of tensors inside the tables of training tools; `content` itself if it is one."""
    for _ in range(3):
        if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
            return content
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if len(inner) != 1:
            return content
        content = inner[0]
    return content
