"""What an unfinished `omniavatar calibrate --mode sparse` has measured, so that a killed one goes on.

After each window the sums of its block masses, and what the next window starts from, are written whole beside
the file that is to be made, and with them the masses of the speakers before. All are kept as they are, so a
run that goes on ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omniavatar.media.atomic import atomic_write_bytes, beside, translate_os_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER = "omniavatar_sparse_progress"
SUFFIX = ".part"


@dataclass(frozen=True, eq=False)
class MeasuredWindows:
    """Finished windows of a measurement.

    - windows: how many of the last speaker.
    - sums: of their block masses, float32 (groups of steps, layers, heads, blocks of queries and of keys).
    - given: what the next window starts from, (1, 16, G, h, w) float32; None after the last one.
    - speaker: number of the last speaker, from 0. earlier: the summed means of those before, as `sums`; None
      for the first.
    """

    windows: int
    sums: NDArray[np.float32]
    given: NDArray[np.float32] | None
    speaker: int = 0
    earlier: NDArray[np.float32] | None = None


class SparseProgress:
    """The file beside `output` with the finished windows of one measurement.

    identity: what decides the masses; the windows of another one are not used.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.path = progress_path(output)
        text = json.dumps(identity, sort_keys=True)
        self._identity = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def read(self) -> MeasuredWindows | str | None:
        """The finished windows, or why those in the file cannot be used; None without a file."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "np") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                if header["identity"] != self._identity:
                    return "they belong to another measurement"
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                windows, known = header["windows"], header["sha256"]
                speaker = header.get("speaker", 0)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return "the file is damaged"
        if _checksum(arrays) != known or (speaker > 0) != ("earlier" in arrays):
            return "the file is damaged"
        return MeasuredWindows(windows, arrays["sums"], arrays.get("given"), speaker, arrays.get("earlier"))

    def write(self, done: MeasuredWindows) -> None:
        """Keep these windows. Raises OutputError."""
        from safetensors.numpy import save

        arrays = {"sums": done.sums} | ({} if done.given is None else {"given": done.given})
        arrays |= {} if done.earlier is None else {"earlier": done.earlier}
        header = {"identity": self._identity, "windows": done.windows, "sha256": _checksum(arrays)}
        header |= {"speaker": done.speaker} if done.speaker else {}
        atomic_write_bytes(self.path, save(arrays, {HEADER: json.dumps(header)}))

    def remove(self) -> None:
        """Delete the file, if it exists. Raises OutputError."""
        with translate_os_error(self.path):
            self.path.unlink(missing_ok=True)


def progress_path(output: Path) -> Path:
    """The file of unfinished work beside `output`."""
    return beside(output, ".", output.name, SUFFIX)


def is_progress_file(path: Path) -> bool:
    """Whether a `SparseProgress` wrote the file. Raises PermissionError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return HEADER in (file.metadata() or {})
    except PermissionError:
        raise
    except (SafetensorError, OSError):
        return False


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
