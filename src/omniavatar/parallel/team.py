"""What the main path sees of the processes that make one video together: a `Team`.

`ONE` is a single process, for which everything here does nothing. Otherwise rank 0 leads: it alone reads
inputs, decides and writes. The others wait for its orders (Python objects, between videos only; see
`AvatarPipeline.follow`) and run the same loop of windows, in which only tensors travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from omniavatar.errors import ConfigError, ResourceError
from omniavatar.model.dit import RunBlocks, WanDiT
from omniavatar.parallel.direct import DirectBorder, DirectHeads, DirectRows
from omniavatar.parallel.exchange import (
    BorderExchange,
    CollectiveHeads,
    CollectiveRows,
    HeadExchange,
    RowExchange,
)
from omniavatar.parallel.guidance import GuidanceParallel, Predict
from omniavatar.parallel.mailbox import Reach, SymmetricMailbox, obstacle
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.picture_rows import PictureRows
from omniavatar.parallel.rank_layout import Layout
from omniavatar.parallel.sequence import SequenceParallel
from omniavatar.sampling.passes import Pass, Passes

Exchange = Literal["auto", "direct", "collective"]
StepVelocities = Callable[[Sequence[Pass], Predict, Tensor], Iterable[Tensor]]
PATIENCE = timedelta(days=7)
"""How long a rank waits for the next order; a rank that died is noticed by its supervisor, not by this."""
STEP_TIMEOUT = timedelta(minutes=10)
"""Longest wait inside a video, for a window's decoding or a full writer."""


class Team(Protocol):
    """The processes of one video. leads: this one reads inputs and writes the video."""

    @property
    def size(self) -> int: ...

    @property
    def leads(self) -> bool: ...

    def arrange(self, layout: Layout, exchange: Exchange = "auto") -> str | None:
        """Form the groups; once, by all ranks, before anything below.

        exchange: how heads, rows and borders travel: direct (`parallel.direct`), collective, or auto: direct
        where the GPUs concerned reach each other, for attention and for the VAE's borders each.
        Returns what was chosen and why, None for one process. Raises ResourceError where direct cannot be.
        """

    @property
    def captures(self) -> bool:
        """Whether the exchanges inside a forward can be captured in a CUDA graph."""

    def apply(self, dit: WanDiT) -> None:
        """Make self-attention span the ranks of a forward; after the optimisations, before offloading."""

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        """`run_blocks` on this rank's tokens. A step cache belongs inside: it keeps local residuals."""

    def velocities(self, passes: Passes) -> StepVelocities:
        """What gives the velocities of a step's passes."""

    def share(self, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The leader's float32 `values` on every rank; the others pass None."""

    def order(self, what: Any) -> None:
        """Tell the other ranks what comes next; by the leader."""

    def next_order(self) -> Any:
        """The leader's next order; by the others."""

    def meet(self) -> None:
        """Wait until all ranks are here, however long it takes."""

    def picture_rows(self, rows: int) -> PictureRows | None:
        """This rank's run of a picture of so many latent rows; None where each has the whole picture."""

    def weight_peers(self) -> Peers | None:
        """The ranks that may share the weights among them: they run the same blocks in the same order."""


class OneProcess:
    """A team of one."""

    size = 1
    leads = True
    captures = True

    def arrange(self, layout: Layout, exchange: Exchange = "auto") -> str | None:
        return None

    def apply(self, dit: WanDiT) -> None:
        pass

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        return run_blocks

    def velocities(self, passes: Passes) -> StepVelocities:
        return _all_here

    def share(self, values: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        assert values is not None
        return values

    def order(self, what: Any) -> None:
        pass

    def next_order(self) -> Any:
        return None

    def meet(self) -> None:
        pass

    def picture_rows(self, rows: int) -> PictureRows | None:
        return None

    def weight_peers(self) -> Peers | None:
        return None


def _all_here(row: Sequence[Pass], predict: Predict, like: Tensor) -> Iterator[Tensor]:
    return map(predict, row)


ONE = OneProcess()


def _exchange_options() -> Any:
    """NCCL's kernels start before those of the model that are ready at the same time.

    Otherwise a product takes every multiprocessor first, and an exchange that was to travel beside it waits
    for its end (two H100, 14B, 30,375 tokens: 1.207 s a forward without priority, 1.199 with it).
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options


class Ranks:
    """A team of the processes of torch's default group, which is initialised already."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device
        self._groups: dict[tuple[tuple[int, ...], ...], Peers] = {}
        assert dist.group.WORLD is not None
        self._everyone = Peers(dist.group.WORLD, self.rank, self.size)
        self._orders = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._reaches: list[Reach] = [Reach.of(device)] * self.size
        dist.all_gather_object(self._reaches, Reach.of(device), group=self._orders)
        self._sequence: SequenceParallel | None = None
        self._captures = True
        self._border: BorderExchange | None = None
        self._guidance: GuidanceParallel | None = None
        self._weights: Peers | None = None
        self.last_order: Any = None
        """What the leader told the others last, for who must know what they are at after an error."""

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
            raise ResourceError(f"exchange: direct copies between GPUs: {in_all}; use exchange=auto")
        wanted = exchange != "collective"
        attention, everywhere = wanted and not in_attention, wanted and not in_all
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
        why = f" (no direct copies: {in_attention or in_all})" if wanted else ""
        if attention and layout.sequence > 1:
            return f"exchanges: attention's by direct copies, the rest by {dist.get_backend()}{why}"
        return f"exchanges: {dist.get_backend()}{why}"

    def _obstacle(self, ranks: Iterable[int]) -> str | None:
        return obstacle([self._reaches[rank] for rank in ranks])

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
        """NCCL's collectives are not: they could be, but NCCL then hangs when it is left (torch 2.11)."""
        return self._captures

    def _peers(self, lists: list[list[int]]) -> Peers:
        """This rank's group of `lists`, made once."""
        key = tuple(map(tuple, lists))
        if key not in self._groups:
            self._groups[key] = self._new_peers(lists)
        return self._groups[key]

    def _new_peers(self, lists: list[list[int]]) -> Peers:
        """A communicator of its own; every rank makes all of `lists`, in the same order."""
        mine: Peers | None = None
        for ranks in lists:
            group = dist.new_group(ranks, timeout=STEP_TIMEOUT, pg_options=_exchange_options())
            if self.rank in ranks:
                mine = Peers(group, ranks.index(self.rank), len(ranks))
        assert mine is not None
        return mine

    def apply(self, dit: WanDiT) -> None:
        if self._sequence is not None:
            dit.attention = self._sequence.attention(dit.attention)

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        return run_blocks if self._sequence is None else self._sequence.shard(run_blocks)

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

    def meet(self) -> None:
        dist.barrier(group=self._orders)

    def picture_rows(self, rows: int) -> PictureRows | None:
        return PictureRows(self._everyone, rows, self._border) if rows >= self.size else None

    def weight_peers(self) -> Peers | None:
        return self._weights


def check_size(team: Team, wanted: int) -> None:
    """Raise ConfigError unless the team has `wanted` processes."""
    if team.size != wanted:
        raise ConfigError(
            f"sp_size, cfg_parallel: {wanted} processes make one video, {team.size} runs; start them with "
            f"torchrun --nproc_per_node={wanted} or generate --gpus, or set both to 1"
        )
