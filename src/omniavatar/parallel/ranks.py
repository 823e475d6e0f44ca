"""A `Team` of several processes over torch.distributed: groups, exchanges, orders."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from omniavatar.errors import ResourceError
from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.parallel.direct import DirectBorder, DirectHeads, DirectRows
from omniavatar.parallel.exchange import (
    BorderExchange,
    CollectiveHeads,
    CollectiveRows,
    HeadExchange,
    RowExchange,
)
from omniavatar.parallel.guidance import GuidanceParallel
from omniavatar.parallel.mailbox import Reach, SymmetricMailbox, obstacle
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.picture_rows import PictureRows
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.sequence import SequenceParallel
from omniavatar.parallel.team import ONE, Exchange, StepVelocities
from omniavatar.sampling.passes import Passes

PATIENCE = timedelta(days=7)
"""How long a rank waits for the next order. The supervisor, not this limit, detects a rank that died."""

STEP_TIMEOUT = timedelta(minutes=10)
"""Longest wait inside a video, for the decoding of a window or a full writer queue."""


def _exchange_options() -> Any:
    """Options that give NCCL's kernels priority over the model's kernels.

    Without them a matrix product takes every multiprocessor first, and an exchange that should overlap it
    waits for its end (two H100, 14B, 30,375 tokens: 1.207 s per forward without priority, 1.199 s with it).
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options


class Ranks:
    """A team of the processes in torch's default group, which must be initialised."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._groups: dict[tuple[tuple[int, ...], ...], Peers] = {}
        assert dist.group.WORLD is not None
        self._everyone = Peers(dist.group.WORLD, self.rank, self.size)
        self._orders = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.reaches: list[Reach] = [Reach.of(device)] * self.size
        dist.all_gather_object(self.reaches, Reach.of(device), group=self._orders)
        self._sequence: SequenceParallel | None = None
        self._captures = True
        self._border: BorderExchange | None = None
        self._guidance: GuidanceParallel | None = None
        self._weights: Peers | None = None
        self.last_order: Any = None
        """The leader's last order; after an error, it shows whether the other ranks are inside a video."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def arrange(self, layout: Layout, exchange: Exchange = "auto") -> str | None:
        if layout.size != self.size:
            raise ValueError(f"a layout of {layout.size} ranks for {self.size} processes")
        sequence = self._peers(layout.sequence_peers())
        heads, rows = self._peers(layout.head_peers()), self._peers(layout.row_peers())
        guidance = self._peers(layout.guidance_peers())
        self._weights = self._new_peers(layout.sequence_peers()) if layout.sequence > 1 else None
        self._guidance = GuidanceParallel(guidance) if layout.guidance > 1 else None
        shared = [ranks for ranks in layout.head_peers() + layout.row_peers() if len(ranks) > 1]
        in_attention = next(filter(None, (self._obstacle(ranks) for ranks in shared)), None)
        in_all = self._obstacle(range(self.size))
        if exchange == "direct" and in_all:
            raise ResourceError(
                f"exchange: direct copies between GPUs are not possible: {in_all}; use exchange=auto"
            )
        may_copy = exchange != "collective"
        attention, everywhere = may_copy and not in_attention, may_copy and not in_all
        self._sequence = None
        if layout.sequence > 1:
            self._sequence = SequenceParallel(
                sequence, self._heads(heads, attention), self._rows(rows, attention)
            )
        self._captures = attention or layout.sequence == 1
        self._border = None
        if everywhere:
            self._border = DirectBorder(self._mailbox(self._everyone), self.rank, self.size)
            return "exchanges: direct copies between the GPUs"
        why = f" (no direct copies: {in_attention or in_all})" if may_copy else ""
        if attention and layout.sequence > 1:
            return f"exchanges: direct copies in attention, {dist.get_backend()} elsewhere{why}"
        return f"exchanges: {dist.get_backend()}{why}"

    def _obstacle(self, ranks: Iterable[int]) -> str | None:
        return obstacle([self.reaches[rank] for rank in ranks])

    def _heads(self, peers: Peers, direct: bool) -> HeadExchange:
        if not direct or peers.size == 1:
            return CollectiveHeads(peers)
        return DirectHeads(self._mailbox(peers), peers.index, peers.size)

    def _rows(self, peers: Peers, direct: bool) -> RowExchange:
        if not direct or peers.size == 1:
            return CollectiveRows(peers)
        return DirectRows(self._mailbox(peers), peers.index, peers.size)

    def _mailbox(self, peers: Peers) -> SymmetricMailbox:
        return SymmetricMailbox(peers.group, self._device, STEP_TIMEOUT)

    @property
    def captures(self) -> bool:
        """False with NCCL's collectives: after a capture, NCCL hangs when it is shut down (torch 2.11)."""
        return self._captures

    def _peers(self, lists: list[list[int]]) -> Peers:
        """This rank's group among `lists`; each set of groups is made only once."""
        key = tuple(map(tuple, lists))
        if key not in self._groups:
            self._groups[key] = self._new_peers(lists)
        return self._groups[key]

    def _new_peers(self, lists: list[list[int]]) -> Peers:
        """A new communicator; every rank must make all groups in `lists`, in the same order."""
        mine: Peers | None = None
        for ranks in lists:
            group = dist.new_group(ranks, timeout=STEP_TIMEOUT, pg_options=_exchange_options())
            if self.rank in ranks:
                mine = Peers(group, ranks.index(self.rank), len(ranks))
        assert mine is not None
        return mine

    def apply(self, dit: WanDiT) -> None:
        dit.attention = self.spread(dit.attention)

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        return run_blocks if self._sequence is None else self._sequence.shard(run_blocks)

    def spread(self, attention: AttentionFn) -> AttentionFn:
        return attention if self._sequence is None else self._sequence.attention(attention)

    def own_heads(self, heads: int) -> slice:
        if self._sequence is None:
            return slice(heads)
        ranks, index = self._sequence.heads.size, self._sequence.heads.index
        return slice(heads // ranks * index, heads // ranks * (index + 1))

    def velocities(self, passes: Passes) -> StepVelocities:
        return (ONE if self._guidance is None else self._guidance).velocities(passes)

    def share(self, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if values is None:
            values = torch.empty(shape, dtype=torch.float32, device=device)
        values = values.to(device=device, dtype=torch.float32).contiguous()
        dist.broadcast(values, src=0)
        return values

    def order(self, what: Any) -> None:
        self.last_order = what
        dist.broadcast_object_list([what], src=0, group=self._orders, device=torch.device("cpu"))

    def next_order(self) -> Any:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._orders, device=torch.device("cpu"))
        return box[0]

    def stops(self, stop: bool | None) -> bool:
        answer = torch.tensor([bool(stop)], dtype=torch.uint8)
        dist.broadcast(answer, src=0, group=self._orders)
        return bool(answer.item())

    def meet(self) -> None:
        dist.barrier(group=self._orders)

    def picture_rows(self, rows: int) -> PictureRows | None:
        return PictureRows(self._everyone, rows, self._border) if rows >= self.size else None

    def weight_peers(self) -> Peers | None:
        return self._weights
