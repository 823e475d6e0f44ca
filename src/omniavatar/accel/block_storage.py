"""The tensors of one block in a single buffer, and copies of the block whose tensors are views of a buffer.

A block is copied to the device as one piece, so its tensors lie behind each other in one buffer. Tensors that
overlap (the packed projection of a fused block and the layers that are views of it) still overlap there.
`rebuilt` makes a copy of a block whose tensors lie in a given buffer; the module's code is unchanged.

Limits: tensors are found in modules, their attributes, and tuples, lists, dicts and dataclasses of these.
Another tensor would stay on its device, and the first product with it would fail.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor lies in the buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_parameter: bool

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in `buffer` (uint8)."""
        extent = _extent(self.shape, self.stride) * self.dtype.itemsize
        flat = buffer[self.offset : self.offset + extent].view(self.dtype)
        tensor = flat.as_strided(self.shape, self.stride)
        return nn.Parameter(tensor, requires_grad=False) if self.is_parameter else tensor


@dataclass(frozen=True)
class BlockLayout:
    """Size of the buffer in bytes and the place of each tensor, in the order of `block_tensors`."""

    size: int
    places: tuple[TensorPlace, ...]


def block_tensors(block: nn.Module, without: Collection[int] = ()) -> list[Tensor]:
    """Every tensor of a block once, also those in plain attributes. without: ids of tensors to leave out."""
    found: dict[int, Tensor] = {}
    for module in block.modules():
        for tensor in _reachable({key: value for key, value in vars(module).items() if key != "_modules"}):
            if id(tensor) not in without:
                found.setdefault(id(tensor), tensor)
    return list(found.values())


def layout_of(tensors: list[Tensor]) -> BlockLayout:
    """Places for `tensors`; tensors that overlap also overlap in the buffer."""
    pieces: list[list[int]] = []
    end: tuple[torch.device, int] | None = None
    for i in sorted(range(len(tensors)), key=lambda i: (str(tensors[i].device), tensors[i].data_ptr())):
        device, start = tensors[i].device, tensors[i].data_ptr()
        if end is None or end[0] != device or start >= end[1]:
            pieces.append([])
            end = (device, start)
        pieces[-1].append(i)
        end = (device, max(end[1], start + _bytes(tensors[i])))
    places: dict[int, TensorPlace] = {}
    size = 0
    for piece in sorted(pieces, key=min):
        base = -(-size // ALIGNMENT) * ALIGNMENT
        first = min(tensors[i].data_ptr() for i in piece)
        for i in piece:
            tensor = tensors[i]
            offset = base + tensor.data_ptr() - first
            size = max(size, offset + _bytes(tensor))
            places[i] = TensorPlace(
                offset, tensor.dtype, tuple(tensor.shape), tensor.stride(), isinstance(tensor, nn.Parameter)
            )
    return BlockLayout(size, tuple(places[i] for i in range(len(tensors))))


def fill(buffer: Tensor, tensors: list[Tensor], layout: BlockLayout) -> None:
    """Write the values of `tensors` into `buffer` (uint8, `layout.size` bytes)."""
    for tensor, place in zip(tensors, layout.places, strict=True):
        place.view(buffer).copy_(tensor.detach())


def rebuilt(
    block: nn.Module, tensors: list[Tensor], layout: BlockLayout, buffer: Tensor, shared: Collection[object]
) -> tuple[nn.Module, list[Tensor]]:
    """A copy of `block` whose `tensors` are views of `buffer`, and these views; `shared` is not copied."""
    views = [place.view(buffer) for place in layout.places]
    memo: dict[int, Any] = {id(each): each for each in shared}
    memo |= {id(tensor): view for tensor, view in zip(tensors, views, strict=True)}
    return copy.deepcopy(block, memo), views


def _reachable(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _reachable(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _reachable(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _reachable(getattr(value, field.name))


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _bytes(tensor: Tensor) -> int:
    return _extent(tuple(tensor.shape), tuple(tensor.stride())) * tensor.dtype.itemsize
