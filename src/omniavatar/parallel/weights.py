"""Distributes the weights of the blocks over ranks; each rank keeps a piece of every block.

The tensors of a block are one run of bytes (`accel.block_storage`), and each of N ranks keeps one N-th of it.
The ring of `accel.offload` holds the blocks that compute. It is filled by an all-gather instead of a copy
from host memory, and the gather of the next block overlaps the computation of the current one. Weights of
every form (packed, float8) are bit-identical. The layers for the text's keys and values are distributed too,
and gathered for each prompt.
Cost: time, if a gather takes longer than a block. Memory falls to 1/N of the blocks plus RING whole ones.
While loading, every rank has all weights in host memory.

All ranks that share weights must run the same blocks in the same order.
Source: ZeRO stage 3 (arXiv 1910.02054), FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.accel.block_storage import block_tensors, fill, layout_of, rebuilt
from omniavatar.accel.offload import PARKED, BlockRing, RingSlot, StreamedBlock
from omniavatar.model.dit import WanDiT
from omniavatar.parallel.peers import gather_into

RING = 2
EMPTY = torch.device("meta")


class WeightGroup(Protocol):
    """The ranks that share weights.

    index: index of this rank among the `size` ranks.
    """

    group: dist.ProcessGroup
    index: int
    size: int


class GatherCopies:
    """Fills the slots of a ring by all-gathers; on CUDA they run on the communicator's stream."""

    def __init__(self, peers: WeightGroup) -> None:
        self._peers = peers
        self._works: dict[int, dist.Work] = {}

    def copy(self, slot: RingSlot, host: Tensor) -> None:
        """Start to gather all pieces; `host` is the piece of this rank.

        The gather runs after the work queued before it, which may still read the slot.
        """
        work = gather_into(slot.buffer, host, self._peers.group, wait=False)
        assert work is not None
        self._works[id(slot)] = work

    def wait(self, slot: RingSlot) -> None:
        work = self._works.pop(id(slot), None)
        if work is not None:
            work.wait()

    def computed(self, slot: RingSlot) -> None:
        pass


class SharedLinear(nn.Module):
    """A linear layer of which each rank keeps one N-th; every call gathers the whole weight."""

    def __init__(self, layer: nn.Linear, peers: WeightGroup, device: torch.device) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self._shape, self._peers = weight.shape, peers
        flat = weight.contiguous().flatten().view(torch.uint8)
        self.weight = nn.Parameter(weight.new_empty(0, device=device), requires_grad=False)
        self._piece = own_piece(flat, peers).to(device)
        self.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.empty(len(self._piece) * self._peers.size, dtype=torch.uint8, device=self._piece.device)
        gather_into(whole, self._piece, self._peers.group)
        size = self._shape.numel() * self.bias.dtype.itemsize
        return F.linear(x, whole[:size].view(self.bias.dtype).view(self._shape), self.bias)


def own_piece(run: Tensor, peers: WeightGroup) -> Tensor:
    """This rank's N-th of a run of bytes, with zeros appended so that all pieces have the same size."""
    size = -(-len(run) // (peers.size * 256)) * 256
    piece = run[peers.index * size : (peers.index + 1) * size]
    return F.pad(piece, (0, size - len(piece))) if len(piece) < size else piece.clone()


@torch.inference_mode(False)
@torch.no_grad()
def apply_shared_weights(dit: WanDiT, peers: WeightGroup, device: torch.device) -> BlockRing:
    """Distribute the blocks of `dit` over the ranks, in place; call it after fusing.

    The blocks may be in host memory. Weights outside the blocks stay whole on every rank. Raises ValueError
    if blocks have different layouts.
    """
    pieces: dict[int, Tensor] = {}
    slots: list[RingSlot] = []
    layout = None
    for index, block in enumerate(dit.blocks):
        cross = block.get_submodule("cross_attn")
        for name in PARKED:
            setattr(cross, name, SharedLinear(cast(nn.Linear, cross.get_submodule(name)), peers, device))
        norm = cross.get_submodule("norm_k")
        norm.weight = nn.Parameter(norm.get_parameter("weight").to(device), requires_grad=False)
        stays = [*norm.parameters()]
        for name in PARKED:
            layer = cross.get_submodule(name)
            stays += [*layer.parameters(), layer._piece]  # type: ignore[list-item]
        tensors = block_tensors(block, {id(tensor) for tensor in stays})
        found = layout_of(tensors)
        if layout is not None and found != layout:
            raise ValueError(f"block {index} has another layout than the blocks before it")
        layout = found
        run = torch.empty(layout.size, dtype=torch.uint8, device=tensors[0].device)
        fill(run, tensors, layout)
        pieces[index] = own_piece(run, peers).to(device)
        shared = [*stays, *(cross.get_submodule(name) for name in PARKED)]
        shared += [vars(module)["_ops"] for module in block.modules() if "_ops" in vars(module)]
        if len(slots) < min(RING, len(dit.blocks)):
            buffer = torch.empty(len(pieces[index]) * peers.size, dtype=torch.uint8, device=device)
            slots.append(RingSlot(buffer, rebuilt(block, tensors, layout, buffer, shared)[0]))
        hollow, _ = rebuilt(block, tensors, layout, run.new_empty(layout.size, device=EMPTY), shared)
        dit.blocks[index] = StreamedBlock(hollow, index)
    ring = BlockRing(pieces, slots, GatherCopies(peers))
    for block in dit.blocks:
        block.ring = ring  # type: ignore[assignment]
    return ring
