"""Writes weight files, with random numbers or given tensors, one tensor at a time.

Random numbers depend only on (seed, file, name), so files can be written in any order and always have the
same bytes. A file appears under its name only when it is complete. torch.save needs a whole PyTorch file in
memory (the largest, UMT5-XXL, is 11.4 GB).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniavatar.checkpoint.initial import initial_spread
from omniavatar.checkpoint.layout import FileLayout, TensorEntry

CHUNK_ELEMENTS = 1 << 22
Progress = Callable[[int, int], None]
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}


def write_random(root: Path, layout: FileLayout, seed: int, on_bytes: Callable[[int], None]) -> None:
    """Write the file `layout` below `root`. Raises OSError.

    on_bytes: called with the number of bytes of each piece.
    """
    path = root / layout.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        if layout.format == "safetensors":
            _write_safetensors(partial, layout, seed, on_bytes)
        else:
            _write_torch(partial, layout, seed, on_bytes)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def byte_counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that adds up byte counts and calls `progress` with (bytes written, `total`)."""
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return on_bytes


def write_tensors(
    path: Path,
    entries: Sequence[TensorEntry],
    load: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    """Write a safetensors file tensor by tensor, in the order of `entries`. Raises OSError.

    load: returns the tensor of a name, on any device; it is cast to the entry's dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(safetensors_header(entries, {"format": "pt", **metadata}))
            for entry in entries:
                tensor = load(entry.key).to(entry.dtype).cpu().contiguous()
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                on_bytes(entry.num_bytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def safetensors_header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The header: 8 bytes with its length, then a JSON table padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.num_bytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_safetensors(path: Path, layout: FileLayout, seed: int, on_bytes: Callable[[int], None]) -> None:
    buffer = np.empty(CHUNK_ELEMENTS, dtype=np.float32)
    with path.open("wb") as file:
        file.write(safetensors_header(layout.tensors, {"format": "pt"}))
        for entry in layout.tensors:
            for piece in _pieces(entry, layout.path, seed, buffer):
                file.write(piece.to(entry.dtype).view(torch.uint8).numpy().data)
                on_bytes(piece.numel() * entry.dtype.itemsize)


def _write_torch(path: Path, layout: FileLayout, seed: int, on_bytes: Callable[[int], None]) -> None:
    tensors: dict[str, Tensor] = {}
    buffer = np.empty(CHUNK_ELEMENTS, dtype=np.float32)
    for entry in layout.tensors:
        flat = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        start = 0
        for piece in _pieces(entry, layout.path, seed, buffer):
            flat[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
            on_bytes(piece.numel() * entry.dtype.itemsize)
        tensors[entry.key] = flat.view(entry.shape)
    try:
        torch.save(tensors, path)  # with an open file, torch would copy each tensor once more
    except RuntimeError as error:
        raise OSError(errno.EIO, f"torch.save failed on {path.name}; is the disk full?") from error


def _pieces(
    entry: TensorEntry, file: str, seed: int, buffer: np.ndarray[tuple[int], np.dtype[np.float32]]
) -> Iterator[Tensor]:
    """The numbers of a tensor in order, as float32; every piece overwrites the previous one in `buffer`."""
    digest = hashlib.sha256(f"{seed}|{file}|{entry.key}".encode()).digest()
    numbers = np.random.Generator(np.random.SFC64(list(np.frombuffer(digest, dtype=np.uint32))))
    mean, std = initial_spread(entry.key, entry.shape)
    width = np.float32(2.0 * std * math.sqrt(3.0))
    low = np.float32(mean - std * math.sqrt(3.0))
    left = math.prod(entry.shape)
    while left:
        values = buffer[: min(left, len(buffer))]
        numbers.random(dtype=np.float32, out=values)
        values *= width
        values += low
        yield torch.from_numpy(values)
        left -= len(values)
