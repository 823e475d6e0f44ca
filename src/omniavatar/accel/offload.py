"""Streaming of transformer blocks: some lie in host memory and are copied to the device when needed.

What changes: a streamed block's weights are one piece of pinned host memory. They are copied in turn into a
small ring of device buffers. Each buffer has a copy of the block whose tensors are views of it, so a forward
changes no pointer. While one block computes, the next ones are copied on a separate stream. The computing
stream waits for an event of the copy, the copy for an event of the last computation that read the buffer; the
host never waits. The first block follows the last one: its copy overlaps with head, sampler and the next
embedding. Two layers of each block make the text's keys and values, once for a prompt. They stay in host
memory (`HostLinear`) and outside the ring. Streamed blocks are spread evenly among the resident ones.
What it loses: nothing, results are bit-identical. It costs time only if a copy takes longer than the
computation it overlaps with (14B in bf16: 0.60 GB a block, 11 ms at 55 GB/s).

Blocks are replaced in `dit.blocks` by `StreamedBlock`s with the same keys and signature, so `run_blocks`, a
cache around it and `prepare_text` are unchanged. On the CPU the same bookkeeping runs with plain copies.

Limits: all streamed blocks have one layout. Weights must not be moved or changed afterwards. Host memory for
them is allocated and locked at once. Source: weight streaming as in FlexGen (arXiv 2303.06865).
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
"""Layers of a block's cross-attention that are used once for a prompt: the text's keys and values."""


@dataclass(frozen=True)
class OffloadConfig:
    """resident_blocks: blocks that stay on the device. ring: buffers for the others; 1 overlaps no copy."""

    resident_blocks: int
    ring: int = 2


@dataclass(eq=False)
class RingSlot:
    """One device buffer, the block that computes from it, and the index of the block it holds."""

    buffer: Tensor
    block: nn.Module
    holds: int | None = None
    events: list[Any] = field(default_factory=list)


class Copies(Protocol):
    """Copies weights into slots. The calls for one slot are copy, wait, (compute), computed, copy, ..."""

    def copy(self, slot: RingSlot, host: Tensor) -> None:
        """Start to fill the slot once the last computation that reads it is done."""

    def wait(self, slot: RingSlot) -> None:
        """Make later computations wait until the slot is filled."""

    def computed(self, slot: RingSlot) -> None:
        """Record that the computation that reads the slot is queued."""


class DirectCopies:
    """Copies that block, for devices without streams: the slow equivalent of `StreamCopies`."""

    def copy(self, slot: RingSlot, host: Tensor) -> None:
        slot.buffer.copy_(host)

    def wait(self, slot: RingSlot) -> None:
        pass

    def computed(self, slot: RingSlot) -> None:
        pass


class StreamCopies:
    """Copies on a separate CUDA stream; a slot's two events are (filled, read)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, slot: RingSlot, host: Tensor) -> None:
        if not slot.events:
            slot.events = [torch.cuda.Event(), torch.cuda.Event()]
            slot.events[1].record(torch.cuda.current_stream(self._device))
        filled, read = slot.events
        self._stream.wait_event(read)
        with torch.cuda.stream(self._stream):
            slot.buffer.copy_(host, non_blocking=True)
        filled.record(self._stream)

    def wait(self, slot: RingSlot) -> None:
        torch.cuda.current_stream(self._device).wait_event(slot.events[0])

    def computed(self, slot: RingSlot) -> None:
        slot.events[1].record(torch.cuda.current_stream(self._device))


class BlockRing:
    """Decides which slot holds which streamed block, and what is copied next."""

    def __init__(self, hosts: dict[int, Tensor], slots: Sequence[RingSlot], copies: Copies) -> None:
        self.slots = tuple(slots)
        self._hosts, self._copies = hosts, copies
        self._order = sorted(hosts)
        self._position = {index: place for place, index in enumerate(self._order)}

    def run(self, index: int, *args: Any) -> Tensor:
        """Compute block `index`; the copies of the next blocks are queued before this returns."""
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
        """One block for each slot, in cyclic order, from `index` or the block after it."""
        first = self._position[index] + (not inclusive)
        count = min(len(self.slots), len(self._order))
        return [self._order[(first + step) % len(self._order)] for step in range(count)]

    def _fetch(self, index: int, keep: Sequence[int]) -> RingSlot:
        """The slot of block `index`, filled from the host if necessary; blocks of `keep` are not replaced."""
        held = next((slot for slot in self.slots if slot.holds == index), None)
        if held is not None:
            return held
        slot = next(slot for slot in self.slots if slot.holds is None or slot.holds not in keep)
        slot.holds = None
        self._copies.copy(slot, self._hosts[index])
        slot.holds = index
        return slot


class HostLinear(nn.Module):
    """A linear layer in host memory; each call copies its weights to the device of the input."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device, non_blocking=True)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.device, non_blocking=True))


class StreamedBlock(nn.Module):
    """Replaces a block whose weights are in host memory: same keys and signature."""

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
            raise RuntimeError(f"block {self.index} is in host memory and is not attached to a ring")
        return self.ring.run(self.index, *args)


@dataclass(frozen=True, eq=False)
class _HostBlock:
    """A block in host memory: `tensors` of `block` are views of `buffer`; its copies share `shared`."""

    block: nn.Module
    buffer: Tensor
    layout: BlockLayout
    tensors: list[Tensor]
    shared: list[object]


class Offloader:
    """The streamed part of one model. More blocks may be moved to the host later; none are moved back."""

    def __init__(self, dit: WanDiT, device: torch.device, copies: Copies | None = None) -> None:
        self._dit, self._device = dit, device
        self._copies = copies
        self._hosts: dict[int, _HostBlock] = {}
        self._applied: OffloadConfig | None = None
        self.ring: BlockRing | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, config: OffloadConfig) -> None:
        """Stream all but `config.resident_blocks` blocks, in addition to those streamed already.

        It waits for the device. Raises ResourceError if the host has no memory to lock, ValueError for blocks
        of different layouts.
        """
        if config.ring < 1:
            raise ValueError("a ring must have at least one buffer")
        if config == self._applied:
            return
        self._applied = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._detach()
        blocks = self._dit.blocks
        streamed = len(blocks) - config.resident_blocks
        even = streamed_blocks(len(blocks), config.resident_blocks)
        for index in (*even, *range(len(blocks))):
            if len(self._hosts) < streamed and index not in self._hosts:
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
            raise ValueError(f"block {index} has another layout than the streamed blocks before it")
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
            slots.append(RingSlot(buffer, block))
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
    """Indices of the blocks to stream, spread evenly among the resident ones."""
    streamed = max(blocks - resident, 0)
    return [i * blocks // streamed for i in range(streamed)]


def apply_offload(
    dit: WanDiT, config: OffloadConfig, device: torch.device, copies: Copies | None = None
) -> Offloader:
    """Stream blocks of `dit` to `device`, in place, after all other optimisations. See `Offloader.apply`."""
    offloader = Offloader(dit, device, copies)
    offloader.apply(config)
    return offloader
