"""One table of the tensors of a model, from one file, several shards or a folder.

Opening reads only headers and `load` reads data, so the shapes of a 57 GB checkpoint are known at once. Every
shard that a numbered name (`-00002-of-00006`) or an index file mentions must exist. A tensor stored twice is
an error. Formats: `safetensors_file`, `torch_file`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from omniavatar.checkpoint.outside import read_table, reason_of
from omniavatar.errors import CheckpointError

if TYPE_CHECKING:
    from omniavatar.checkpoint.tensor_info import TensorInfo

PathLike = str | os.PathLike[str]

FOLDER_CANDIDATES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model.pt",
)
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NUMBERED = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)$")


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
    from omniavatar.checkpoint.safetensors_file import SafetensorsFile
    from omniavatar.checkpoint.torch_file import TorchFile

    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return TorchFile(path)
    raise CheckpointError(f"{path}: unknown type of weight file; use .safetensors, .pth, .pt or a folder")


class TensorFiles:
    """The tensors of a file, a list of shards, an index file, or a Hugging Face folder.

    Names lose the parts that PyTorch's wrappers of modules add (`module.`, `_orig_mod.`).

    Use it as a context manager or call `close`. Raises CheckpointError if a file is missing or damaged.
    """

    def __init__(self, paths: PathLike | Sequence[PathLike]) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise CheckpointError("no weight file is given; set its path")
        self.paths = tuple(file for path in given for file in _expand(Path(path)))
        _check_numbering(self.paths)
        self._owner: dict[str, tuple[TensorFile, str]] = {}
        self._files: list[TensorFile] = []
        try:
            for path in self.paths:
                self._add(path)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        file = open_tensor_file(path)
        self._files.append(file)
        for stored in file.index:
            key = unwrapped(stored)
            if key in self._owner:
                raise CheckpointError(
                    f"{key} is stored twice, in {self._owner[key][0].path} and in {path}; remove one file"
                )
            self._owner[key] = file, stored

    @property
    def origin(self) -> str:
        """Name of these files in messages."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"

    @property
    def metadata(self) -> dict[str, str]:
        """Text entries in the safetensors headers of all files."""
        return {key: value for file in self._files for key, value in file.metadata.items()}

    def keys(self) -> list[str]:
        """All names in the order of the data; loading in this order reads the files forward."""
        return list(self._owner)

    def __contains__(self, key: object) -> bool:
        return key in self._owner

    def __len__(self) -> int:
        return len(self._owner)

    def info(self, key: str) -> TensorInfo:
        """dtype and shape of `key` from the header."""
        file, stored = self._owner[key]
        return file.index[stored]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        return self.info(key).dtype

    def load(self, key: str) -> Tensor:
        """A CPU tensor in the stored dtype, with its own memory."""
        file, stored = self._owner[key]
        return file.load(stored)

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill `out` (uint8) with the bytes of `key` from byte `start`; several threads may call it.

        Raises CheckpointError if the data ends early.
        """
        file, stored = self._owner[key]
        file.read(stored, start, out)

    def path_of(self, key: str) -> Path:
        """The file that holds `key`."""
        return self._owner[key][0].path

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unwrapped(key: str) -> str:
    """`key` without the parts that DataParallel, torch.compile, FSDP and checkpointing add to names."""
    return _WRAPPER.sub("", key)


def _expand(path: Path) -> list[Path]:
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); correct the path") from None
    if path.is_dir():
        for name in FOLDER_CANDIDATES:
            if (path / name).is_file():
                return _expand(path / name)
        raise CheckpointError(
            f"{path}: this folder has no weight file (looked for {', '.join(FOLDER_CANDIDATES)}); "
            "correct the path"
        )
    if not path.exists():
        raise CheckpointError(f"{path}: weight file not found; run `{_remedy(path)}`, or correct the path")
    return _expand_index(path) if path.name.endswith(".index.json") else [path]


def _expand_index(path: Path) -> list[Path]:
    table = read_table(path).get("weight_map")
    values = list(table.values()) if isinstance(table, dict) else []
    if not values or any(type(name) is not str or name != Path(name).name for name in values):
        raise CheckpointError(
            f"{path}: has no weight_map of shards in its own folder; download the index again"
        )
    shards = [path.parent / name for name in dict.fromkeys(values)]
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard}: a shard of {path.name} is missing; run `{_remedy(path)}`")
    return shards


def _check_numbering(paths: Sequence[Path]) -> None:
    given = {path.resolve() for path in paths}
    for path in paths:
        match = _NUMBERED.match(path.name)
        if not match:
            continue
        for number in range(1, int(match["total"]) + 1):
            sibling = path.with_name(f"{match['stem']}-{number:05d}-of-{match['total']}{match['suffix']}")
            if sibling.resolve() not in given:
                remedy = "list it too" if sibling.is_file() else f"run `{_remedy(path)}`"
                raise CheckpointError(
                    f"{sibling}: shard {number} of {int(match['total'])} is missing; {remedy}"
                )


def _remedy(path: Path) -> str:
    from omniavatar.checkpoint.layout import merged_name

    if merged_name([path]) == "livetalk":
        return "omniavatar download livetalk"
    if "nano" in str(path):
        return "omniavatar make-checkpoint --scale nano --out pretrained_models/nano"
    scale = next((scale for scale in ("1.3B", "14B") if scale in str(path)), "14B|1.3B")
    return f"omniavatar download {scale}"
