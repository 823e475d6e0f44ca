"""Strict loading: every weight of a module made on the meta device is filled exactly once, or one error.

Names and shapes are compared before any data moves; then tensor after tensor is loaded, cast, moved to its
device and put in place of the meta tensor, so nothing exists twice and nothing is left uninitialised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.errors import CheckpointError

SHOWN = 8
DtypeOf = Callable[[str], torch.dtype]
DeviceOf = Callable[[str], torch.device]


@dataclass(frozen=True)
class TensorSource:
    """Where one weight comes from: its shape, known without data, and a function that makes it.

    `load` may return any dtype and device; the loader casts and moves.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def file_sources(
    files: TensorFiles,
    rename: Callable[[str], str | None] | None = None,
    load: Callable[[TensorFiles, str], Tensor] = TensorFiles.load,
) -> dict[str, TensorSource]:
    """Sources for every tensor of `files`, under the names a module uses.

    rename: file name -> module name, or None for a tensor that the module has no use for.
    load: how a tensor is read (`Staging.load` brings it to a CUDA device).
    Raises CheckpointError when two tensors of the file get one name.
    """
    sources: dict[str, TensorSource] = {}
    for key in files.keys():  # noqa: SIM118  (keys() is the documented order)
        name = key if rename is None else rename(key)
        if name is None:
            continue
        if name in sources:
            raise CheckpointError(f"{files.origin}: two tensors stand for {name} (one of them is {key})")
        sources[name] = TensorSource(files.shape(key), functools.partial(load, files, key))
    return sources


def load_strict(
    module: nn.Module,
    sources: Mapping[str, TensorSource],
    *,
    dtype: torch.dtype | DtypeOf,
    device: torch.device | str | DeviceOf,
    origin: str,
) -> None:
    """Fill `module` (on meta) from `sources`, in the order of `sources`.

    dtype: of all floating-point weights, or a function of the weight's name; integers keep theirs.
    device: of all weights, or a function of the weight's name.
    origin: how the error names the files. A tied weight may be given under any one of its names.
    Weights come out without gradients. Raises CheckpointError listing missing, unexpected, misshaped names.
    """
    wanted = _wanted(module)
    for slot_name, name in _matched(module, wanted, sources, origin).items():
        tensor = sources[name].load()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype if isinstance(dtype, torch.dtype) else dtype(slot_name))
        wanted[slot_name].put(module, tensor.to(device(slot_name) if callable(device) else device))
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(module).__name__} keeps weights on meta that no file can fill: {left}")


def check_sources(module: nn.Module, sources: Mapping[str, TensorSource], origin: str) -> None:
    """The check of `load_strict` alone: nothing is read."""
    _matched(module, _wanted(module), sources, origin)


def _matched(
    module: nn.Module, wanted: Mapping[str, _Slot], sources: Mapping[str, TensorSource], origin: str
) -> dict[str, str]:
    """For each wanted weight the source's name, in the order of the sources."""
    aliases = {name: slot.names[0] for slot in wanted.values() for name in slot.names}
    filled: dict[str, str] = {}
    unexpected: list[str] = []
    misshaped: list[str] = []
    for name, source in sources.items():
        slot_name = aliases.get(name)
        if slot_name is None or slot_name in filled:
            unexpected.append(name)
            continue
        filled[slot_name] = name
        expected = wanted[slot_name].shape
        if tuple(source.shape) != expected:
            misshaped.append(f"{name} is {_shown(source.shape)}, not {_shown(expected)}")
    missing = [name for name in wanted if name not in filled]
    if missing or unexpected or misshaped:
        problems = [
            f"{len(items)} {kind}: {abbreviated(items)}"
            for kind, items in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
            if items
        ]
        raise CheckpointError(f"{origin}: does not fit {type(module).__name__}: {'; '.join(problems)}")
    return filled


@dataclass(frozen=True)
class _Slot:
    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_parameter: bool

    def put(self, module: nn.Module, tensor: Tensor) -> None:
        value = nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor
        for name in self.names:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, value)


def _wanted(module: nn.Module) -> dict[str, _Slot]:
    saved = set(module.state_dict())
    tied: dict[int, list[str]] = {}
    tensors: dict[int, tuple[Tensor, bool]] = {}
    for is_parameter, named in (
        (True, module.named_parameters(remove_duplicate=False)),
        (False, module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            if name in saved:
                tied.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = (tensor, is_parameter)
    return {
        names[0]: _Slot(tuple(names), tuple(tensors[key][0].shape), tensors[key][1])
        for key, names in tied.items()
    }


def _shown(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


def abbreviated(items: list[str]) -> str:
    """The first of a list of names, and how many more there are."""
    more = f" ... and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
