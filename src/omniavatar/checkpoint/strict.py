"""Strict loading: every weight of a module on the meta device is filled exactly once, or one error is raised.

Names and shapes are compared before any data is read. Then one tensor at a time is loaded, cast, moved to its
device and replaces the meta tensor, so no weight exists twice and none stays uninitialised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniavatar.checkpoint.finite import FiniteCheck, Part
from omniavatar.checkpoint.reader import TensorFiles
from omniavatar.errors import CheckpointError

SHOWN = 8
DtypeOf = Callable[[str], torch.dtype]
DeviceOf = Callable[[str], torch.device]


@dataclass(frozen=True)
class TensorSource:
    """The source of one weight: its shape, and a function that loads it.

    load: may return any dtype and device; the loader casts and moves the tensor.
    parts: the stored tensors it is made of, to name the one that holds NaN.
    """

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    parts: tuple[Part, ...] = ()


def file_sources(
    files: TensorFiles,
    rename: Callable[[str], str | None] | None = None,
    load: Callable[[TensorFiles, str], Tensor] = TensorFiles.load,
) -> dict[str, TensorSource]:
    """Sources for every tensor of `files`, by the names in the module.

    rename: gives the module's name for a file's name, or None to skip the tensor.
    load: reads a tensor (`Staging.load` copies it to a CUDA device).

    Raises CheckpointError if two tensors get the same name.
    """
    sources: dict[str, TensorSource] = {}
    for key in files.keys():  # noqa: SIM118  (keys() is the documented order)
        name = key if rename is None else rename(key)
        if name is None:
            continue
        if name in sources:
            raise CheckpointError(f"{files.origin}: two tensors both mean {name} (one of them is {key})")
        sources[name] = TensorSource(files.shape(key), functools.partial(load, files, key), ((files, key),))
    return sources


def load_strict(
    module: nn.Module,
    sources: Mapping[str, TensorSource],
    *,
    dtype: torch.dtype | DtypeOf,
    device: torch.device | str | DeviceOf,
    origin: str,
) -> None:
    """Fill `module` (on the meta device) from `sources`, in the order of `sources`, without gradients.

    A tied weight may be given under any one of its names.

    dtype: of all floating-point weights, or a function of the weight's name; integers keep their dtype.
    device: of all weights, or a function of the weight's name.
    origin: name of the files in the error.

    Raises CheckpointError that lists missing, unexpected and misshaped names, or names a weight that is not
    finite in its final dtype.
    """
    slots = _slots(module)
    with FiniteCheck(origin) as check:
        matched = _matched(module, slots, sources, origin)
        for slot_name, name in matched.items():
            tensor = sources[name].load()
            parts = sources[name].parts
            slots[slot_name].check_kind(name, tensor, parts[0][0].origin if parts else origin)
            if tensor.is_floating_point():
                tensor = tensor.to(dtype if isinstance(dtype, torch.dtype) else dtype(slot_name))
            moved = tensor.to(device(slot_name) if callable(device) else device)
            check.add(name, tensor if moved.device.type == "cpu" else moved, parts)
            slots[slot_name].put(module, moved)
        tensors = module.state_dict()
        check.finish({name: tensors[slot_name] for slot_name, name in matched.items()})
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(module).__name__} has weights on meta that no file can fill: {left}")


def check_sources(module: nn.Module, sources: Mapping[str, TensorSource], origin: str) -> None:
    """Run the check of `load_strict` without reading data."""
    _matched(module, _slots(module), sources, origin)


def _matched(
    module: nn.Module, slots: Mapping[str, _Slot], sources: Mapping[str, TensorSource], origin: str
) -> dict[str, str]:
    """The name of the source for each slot, in the order of the sources."""
    aliases = {name: slot.names[0] for slot in slots.values() for name in slot.names}
    filled: dict[str, str] = {}
    unexpected: list[str] = []
    misshaped: list[str] = []
    for name, source in sources.items():
        slot_name = aliases.get(name)
        if slot_name is None or slot_name in filled:
            unexpected.append(name)
            continue
        filled[slot_name] = name
        expected = slots[slot_name].shape
        if tuple(source.shape) != expected:
            misshaped.append(f"{name} is {_shown(source.shape)}, not {_shown(expected)}")
    missing = [name for name in slots if name not in filled]
    if missing or unexpected or misshaped:
        problems = [
            f"{len(items)} {kind}: {abbreviated(items)}"
            for kind, items in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
            if items
        ]
        found = f"does not fit {type(module).__name__} ({'; '.join(problems)})"
        raise CheckpointError(f"{origin}: {found}; use the released files, or download them again")
    return filled


@dataclass(frozen=True)
class _Slot:
    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_parameter: bool
    is_floating_point: bool

    def check_kind(self, name: str, tensor: Tensor, origin: str) -> None:
        """Raise CheckpointError for whole numbers where the module computes with others, and the reverse."""
        if tensor.is_floating_point() != self.is_floating_point:
            kind = "floating-point" if self.is_floating_point else "whole"
            raise CheckpointError(
                f"{origin}: {name} holds numbers of {tensor.dtype}, not {kind} ones; use the released file"
            )

    def put(self, module: nn.Module, tensor: Tensor) -> None:
        value = nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor
        for name in self.names:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, value)


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """The tensors of the module's state dict; tied names share one slot."""
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
        names[0]: _Slot(
            tuple(names), tuple(tensors[key][0].shape), tensors[key][1], tensors[key][0].is_floating_point()
        )
        for key, names in tied.items()
    }


def _shown(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


def abbreviated(items: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    more = f" ... and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more
