"""Streaming of transformer blocks: those beyond the resident ones live in host memory and visit the device.

What changes: a streamed block's weights are one piece of pinned host memory. A small ring of device buffers
takes them in turn; each buffer has a twin of the block whose tensors are views of it, so a forward moves no
pointer. While one block computes, the next ones are copied on a stream of their own: the computing stream
waits for an event of the copy, the copy for an event of the last computation that read the buffer, and the
host for nothing. After the last block comes the first one again: its copy hides behind head, sampler and the
next embedding. Keys and values of the text need two layers of each block once a prompt; these stay in host
memory (`HostLinear`) and take no room in the ring. Streamed blocks lie evenly among the resident ones.
What it loses: nothing, results are equal to the bit; time only where a copy outlasts the computation it hides
behind (14B in bf16: 0.60 GB a block, 11 ms at 55 GB/s).

Blocks are replaced in `dit.blocks` by `StreamedBlock`s of the same keys and signature, so `run_blocks`, a
cache around it and `prepare_text` stay as they are. On the CPU the same bookkeeping runs with plain copies.

Limits: all streamed blocks have one layout; weights must not be moved or changed afterwards; host memory for
them is taken whole and locked. Source: weight streaming as in FlexGen (arXiv 2303.06865).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.accel.block_storage import BlockLayout, block_tensors, fill, layout_of, rebuilt
from omniavatar.accel.pinned import host_buffer, host_copy
from omniavatar.model.dit import WanDiT
from omniavatar.model.layers import CrossAttention

PARKED = ("k", "v")
"""Layers of a block's cross-attention used once a prompt, for the text's keys and values."""


@dataclass(frozen=True)
class OffloadConfig:
    """resident_blocks: blocks that stay on the device. ring: buffers for the others; 1 hides no copy."""

    resident_blocks: int
    ring: int = 2


@dataclass(eq=False)
class Slot:
    """One device buffer, the block that computes from it, and the index of the block it holds."""

    buffer: Tensor
    block: nn.Module
    holds: int | None = None
    events: list[Any] = field(default_factory=list)


class Copies(Protocol):
    """How weights get into a slot. Calls for one slot come as copy, wait, (compute), computed, copy, ..."""

    def copy(self, slot: Slot, host: Tensor) -> None:
        """Begin to fill the slot, after the last computation that read it."""

    def wait(self, slot: Slot) -> None:
        """What is computed from now on sees the filled slot."""

    def computed(self, slot: Slot) -> None:
        """The computation that reads the slot has been handed to the device."""


class DirectCopies:
    """Copies at once, for devices without streams; the twin of `StreamCopies`."""

    def copy(self, slot: Slot, host: Tensor) -> None:
        slot.buffer.copy_(host)

    def wait(self, slot: Slot) -> None:
        pass

    def computed(self, slot: Slot) -> None:
        pass


class StreamCopies:
    """Copies on a CUDA stream of their own; a slot's two events are (filled, read)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, slot: Slot, host: Tensor) -> None:
        if not slot.events:
            slot.events = [torch.cuda.Event(), torch.cuda.Event()]
            slot.events[1].record(torch.cuda.current_stream(self._device))
        filled, read = slot.events
        self._stream.wait_event(read)
        with torch.cuda.stream(self._stream):
            slot.buffer.copy_(host, non_blocking=True)
        filled.record(self._stream)

    def wait(self, slot: Slot) -> None:
        torch.cuda.current_stream(self._device).wait_event(slot.events[0])

    def computed(self, slot: Slot) -> None:
        slot.events[1].record(torch.cuda.current_stream(self._device))


class BlockRing:
    """Which streamed block lies in which slot, and what is copied next."""

    def __init__(self, hosts: dict[int, Tensor], slots: Sequence[Slot], copies: Copies) -> None:
        self.slots = tuple(slots)
        self._hosts, self._copies = hosts, copies
        self._order = sorted(hosts)
        self._position = {index: place for place, index in enumerate(self._order)}

    def run(self, index: int, *args: Any) -> Tensor:
        """Compute block `index`; the blocks after it are on their way before this returns."""
        slot = self._fetch(index, self._after(index, inclusive=True))
        self._copies.wait(slot)
        try:
            out: Tensor = slot.block(*args)
        finally:
            self._copies.computed(slot)
        upcoming = self._after(index, inclusive=False)
        for following in upcoming:
            self._fetch(following, upcoming)
        return out

    def _after(self, index: int, inclusive: bool) -> list[int]:
        """As many blocks as there are slots, in cyclic order, from `index` or the block after it."""
        first = self._position[index] + (not inclusive)
        count = min(len(self.slots), len(self._order))
        return [self._order[(first + step) % len(self._order)] for step in range(count)]

    def _fetch(self, index: int, keep: Sequence[int]) -> Slot:
        """The slot of block `index`, filled from the host if need be; slots of `keep` are not given up."""
        held = next((slot for slot in self.slots if slot.holds == index), None)
        if held is not None:
            return held
        slot = next(slot for slot in self.slots if slot.holds is None or slot.holds not in keep)
        slot.holds = None
        self._copies.copy(slot, self._hosts[index])
        slot.holds = index
        return slot


class HostLinear(nn.Module):
    """A linear layer that lives in host memory and visits the device of its input for each call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device, non_blocking=True)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.device, non_blocking=True))


class StreamedBlock(nn.Module):
    """Stands in for a block whose weights are in host memory: same keys and signature."""

    def __init__(self, host_block: nn.Module, index: int) -> None:
        super().__init__()
        for name, child in host_block.named_children():
            setattr(self, name, child)
        for name, parameter in host_block.named_parameters(recurse=False):
            setattr(self, name, parameter)
        self.index = index
        self.ring: BlockRing | None = None

    def forward(self, *args: Any) -> Tensor:
        if self.ring is None:
            raise RuntimeError(f"block {self.index} is in host memory and has no ring to run in")
        return self.ring.run(self.index, *args)


@dataclass(frozen=True, eq=False)
class _HostBlock:
    """A block in host memory: `block`'s `tensors` are views of `buffer`; `shared` is common to its twins."""

    block: nn.Module
    buffer: Tensor
    layout: BlockLayout
    tensors: list[Tensor]
    shared: list[object]


class Offloader:
    """The streamed part of one model. More blocks may be sent to the host later, none come back."""

    def __init__(self, dit: WanDiT, device: torch.device, copies: Copies | None = None) -> None:
        self._dit, self._device = dit, device
        self._copies = copies
        self._hosts: dict[int, _HostBlock] = {}
        self._applied: OffloadConfig | None = None
        self.ring: BlockRing | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, config: OffloadConfig) -> None:
        """Stream as many blocks as `config` says, those streamed already among them. Waits for the device.

        Raises ResourceError when the host has no memory to lock, ValueError for blocks of different layouts.
        """
        if config.ring < 1:
            raise ValueError("a ring has at least one buffer")
        if config == self._applied:
            return
        self._applied = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._detach()
        blocks = self._dit.blocks
        wanted = len(blocks) - config.resident_blocks
        even = streamed_blocks(len(blocks), config.resident_blocks)
        for index in (*even, *range(len(blocks))):
            if len(self._hosts) < wanted and index not in self._hosts:
                self._send(index)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if self._hosts:
            self._attach(min(config.ring, len(self._hosts)))
        self._applied = config

    def _send(self, index: int) -> None:
        block = self._dit.blocks[index]
        cross = cast(CrossAttention, block.cross_attn)
        for name in PARKED:
            layer = cast(nn.Linear, getattr(cross, name))
            bias = None if layer.bias is None else host_copy(layer.bias, self._device)
            setattr(cross, name, HostLinear(host_copy(layer.weight, self._device), bias))
        cross.norm_k.weight = nn.Parameter(cross.norm_k.weight.to(self._device), requires_grad=False)
        stays = [*cross.k.parameters(), *cross.v.parameters(), *cross.norm_k.parameters()]
        tensors = block_tensors(block, {id(tensor) for tensor in stays})
        layout = layout_of(tensors)
        if any(other.layout != layout for other in self._hosts.values()):
            raise ValueError(f"block {index} is laid out unlike the streamed blocks before it")
        shared = [*stays, *(vars(module)["_ops"] for module in block.modules() if "_ops" in vars(module))]
        buffer = host_buffer(layout.size, self._device)
        fill(buffer, tensors, layout)
        host_block, views = rebuilt(block, tensors, layout, buffer, shared)
        self._hosts[index] = _HostBlock(host_block, buffer, layout, views, shared)
        self._dit.blocks[index] = StreamedBlock(host_block, index)

    def _attach(self, ring: int) -> None:
        host = next(iter(self._hosts.values()))
        slots = []
        for _ in range(ring):
            buffer = torch.empty(host.layout.size, dtype=torch.uint8, device=self._device)
            block, _ = rebuilt(host.block, host.tensors, host.layout, buffer, host.shared)
            slots.append(Slot(buffer, block))
        copies = self._copies
        if copies is None:
            copies = StreamCopies(self._device) if self._device.type == "cuda" else DirectCopies()
        self.ring = BlockRing({index: each.buffer for index, each in self._hosts.items()}, slots, copies)
        for index in self._hosts:
            cast(StreamedBlock, self._dit.blocks[index]).ring = self.ring

    def _detach(self) -> None:
        self.ring = None
        for index in self._hosts:
            cast(StreamedBlock, self._dit.blocks[index]).ring = None


def streamed_blocks(blocks: int, resident: int) -> list[int]:
    """Indices of the blocks to stream, evenly among the resident ones."""
    streamed = max(blocks - resident, 0)
    return [i * blocks // streamed for i in range(streamed)]


def apply_offload(
    dit: WanDiT, config: OffloadConfig, device: torch.device, copies: Copies | None = None
) -> Offloader:
    """Stream blocks of `dit` to `device`, in place; after every other optimisation. See `Offloader.apply`."""
    offloader = Offloader(dit, device, copies)
    offloader.apply(config)
    return offloader
