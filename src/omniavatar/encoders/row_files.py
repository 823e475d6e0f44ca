"""Float32 matrices on disk that are read and written a few rows at a time.

`RowFile` uses plain reads and writes, so its data does not count as memory of the process. `ColumnWriter`
fills a row-major `.npy` file one block of columns at a time, through short-lived memory maps of a few rows.
It writes zeros to the whole file first, because a full disk under a memory map kills the process instead of
raising an error.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import torch

from omniavatar.errors import OutputError

FLOAT_BYTES = 4
FILL_BYTES = 8 * 2**20


def release_pages(array: np.ndarray) -> None:
    """Release the resident pages of a file's memory map; they are read again when needed."""
    owner: object = array
    while isinstance(owner, np.ndarray):
        if isinstance(owner, np.memmap) and owner.mode == "c":
            return
        owner = owner.base
    if isinstance(owner, mmap.mmap):
        owner.madvise(mmap.MADV_DONTNEED)


@contextmanager
def features_file(out: Path) -> Iterator[Path]:
    """Yield the path to write audio features to. The file becomes `out` after the block, if that succeeds.

    Raises OutputError for an OSError.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        try:
            yield partial
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{error.filename or out}: cannot write the audio features ({error.strerror or error}); "
            "free some disk space or choose another folder"
        ) from error


def write_header(file: BinaryIO, rows: int, width: int) -> None:
    """Begin a `.npy` file of float32 (rows, width), whose rows follow."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)


class RowFile:
    """Scratch matrix (rows, width) in float32. The file is deleted when the context ends."""

    def __init__(self, path: Path, rows: int, width: int) -> None:
        self.path, self.rows, self.width = path, rows, width
        self._file = path.open("w+b", buffering=0)

    def write(self, start: int, values: torch.Tensor) -> None:
        """Store `values` (n, width) as rows start..start+n."""
        data = values.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1).data.cast("B")
        offset = start * self.width * FLOAT_BYTES
        while data:
            written = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, (n, width) float32 on the CPU."""
        rows = np.empty((stop - start, self.width), np.float32)
        data = rows.reshape(-1).data.cast("B")
        offset = start * self.width * FLOAT_BYTES
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise OSError(f"{self.path} ends before row {stop}")
            data, offset = data[count:], offset + count
        return torch.from_numpy(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class ColumnWriter:
    """A float32 matrix (rows, blocks * width) at `path`, written and read one block of columns at a time."""

    def __init__(self, path: Path, rows: int, width: int, blocks: int) -> None:
        self.path, self.rows, self.width = path, rows, width
        self.row_bytes = width * blocks * FLOAT_BYTES
        zeros = bytes(min(FILL_BYTES, rows * self.row_bytes))
        with path.open("wb") as file:
            write_header(file, rows, width * blocks)
            self._data_start = file.tell()
            for start in range(0, rows * self.row_bytes, FILL_BYTES):
                file.write(zeros[: rows * self.row_bytes - start])
            file.flush()
            os.fsync(file.fileno())

    def _rows(self, start: int, count: int, mode: str) -> np.memmap:
        shape = (count, self.row_bytes // FLOAT_BYTES)
        offset = self._data_start + start * self.row_bytes
        return np.memmap(self.path, np.float32, mode, offset, shape)  # type: ignore[call-overload]

    def _columns(self, block: int) -> slice:
        return slice(block * self.width, (block + 1) * self.width)

    def write(self, block: int, start: int, values: torch.Tensor) -> None:
        """Store `values` (n, width) in column block `block`, rows start..start+n."""
        data = values.detach().to("cpu", torch.float32).numpy()
        self._rows(start, len(data), "r+")[:, self._columns(block)] = data

    def read(self, block: int, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of column block `block`, (n, width) float32 on the CPU."""
        return torch.from_numpy(np.array(self._rows(start, stop - start, "r")[:, self._columns(block)]))
