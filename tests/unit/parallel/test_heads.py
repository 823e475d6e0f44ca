"""Exchanges of heads: direct copies equal collectives, and graphs and slots are used correctly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from time import sleep
from unittest import mock

import pytest
import torch
from torch import Tensor

from omniavatar.errors import ConfigError, ResourceError
from omniavatar.parallel.direct import DirectBorder, DirectHeads, DirectRows
from omniavatar.parallel.exchange import CollectiveHeads, CollectiveRows, HeadExchange, RowExchange
from omniavatar.parallel.mailbox import Reach, obstacle
from omniavatar.parallel.picture_rows import PictureRows
from omniavatar.parallel.rank_layout import Layout, deal, starts
from omniavatar.parallel.ranks import Ranks
from ranks import RankPool
from thread_ranks import Board, ThreadPeers, on_threads


class Room(Board):
    """The shared state of a group: memory into which each rank writes, and one barrier per slot."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size
        self.memory: dict[tuple[int, int], Tensor] = {}
        self.lock = threading.Lock()
        self.barriers: dict[int, threading.Barrier] = {}

    def barrier_of(self, number: int) -> threading.Barrier:
        with self.lock:
            return self.barriers.setdefault(number, threading.Barrier(self.size))


class ThreadSlot:
    """A slot that the other ranks write at once.

    The barrier is as late as possible: in the wait of `mark`, or in `meet` if `eager`.
    """

    def __init__(self, room: Room, number: int, size: int, eager: bool) -> None:
        self._room, self.number, self._size, self.eager = room, number, size, eager

    def view(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._room.lock:
            whole = self._room.memory.setdefault(
                (self.number, rank), torch.full((4 * self._size,), 255, dtype=torch.uint8)
            )
        size = dtype.itemsize
        for length in shape:
            size *= length
        assert size <= self._size
        return whole[:size].view(dtype).view(*shape)

    def meet(self) -> None:
        if self.eager:
            self._room.barrier_of(self.number).wait(20)


class ThreadMailbox:
    def __init__(self, room: Room, random: Random, eager: bool = False) -> None:
        self._room, self._random, self._eager = room, random, eager
        self.numbers: list[int] = []

    def slot(self, number: int, size: int) -> ThreadSlot:
        self.numbers.append(number)
        return ThreadSlot(self._room, number, size, self._eager)

    @contextmanager
    def aside(self) -> Iterator[None]:
        sleep(self._random.random() * 2e-3)
        yield

    def mark(self) -> Callable[[], None]:
        barrier = self._room.barrier_of(self.numbers[-1])

        def wait() -> None:
            barrier.wait(20)
            sleep(self._random.random() * 2e-3)

        return wait


def layers_of_attention(
    exchange: HeadExchange, mine: Tensor, counts: list[int], pieces: int, layers: int
) -> list[Tensor]:
    """A function that, like attention, mixes all tokens of a head, layer by layer."""
    share = mine.shape[2] // exchange.size
    spans = [slice(first, first + share // pieces) for first in range(0, share, share // pieces)]
    found = []
    for layer in range(layers):
        sent = [
            [exchange.to_heads((mine.float() * factor).to(mine.dtype), span, counts) for span in spans]
            for factor in (3.0, 1.0, 2.0)
        ]
        results = []
        for v, q, k in zip(*sent, strict=True):
            rows_v, rows_q, rows_k = v.wait().float(), q.wait().float(), k.wait().float()
            mixed = rows_q + rows_k.roll(layer + 1, 0) * 0.5 - rows_v.flip(0) * 0.25
            results.append(exchange.to_tokens((mixed / mixed.abs().max()).to(mine.dtype), counts))
        by_piece = [each.wait() for each in results]
        rows = [part for by_rank in zip(*by_piece, strict=True) for part in by_rank]
        mine = torch.cat([row.transpose(0, 1) for row in rows], 2)
        found.append(mine)
    return found


def layers_of_rows(exchange: RowExchange, mine: Tensor, counts: list[int]) -> list[Tensor]:
    """Gathers keys and values layer by layer; the rows of a layer depend on all rows of the previous one."""
    found = []
    for _ in range(6):
        both = [exchange.spread(mine * factor, counts) for factor in (1.0, 2.0)]
        keys, values = (each.wait() for each in both)
        found += [keys.clone(), values.clone()]
        mine = (mine + values.mean(0) - keys.roll(1, 0)[: len(mine)] * 0.5) / 2
    return found


@pytest.mark.parametrize(("size", "total"), [(2, 11), (3, 9)])
def test_rows_spread_by_direct_copies(size: int, total: int) -> None:
    counts = deal(total, size)
    rows = [torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(count)) for count in counts]
    room = Room(size)
    expected = on_threads(
        size, lambda rank: layers_of_rows(CollectiveRows(ThreadPeers(room, rank, size)), rows[rank], counts)
    )
    mailboxes = [ThreadMailbox(room, Random(rank)) for rank in range(size)]
    found = on_threads(
        size, lambda rank: layers_of_rows(DirectRows(mailboxes[rank], rank, size), rows[rank], counts)
    )
    for rank in range(size):
        assert all(torch.equal(a, b) for a, b in zip(found[rank], expected[rank], strict=True))
        assert mailboxes[rank].numbers == [0, 1, 2, 3] * 3  # keys and values of two blocks in turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("size", "pieces", "batch"), [(2, 1, 1), (2, 2, 2), (3, 1, 1), (4, 1, 2)])
def test_direct_copies_bring_what_collectives_bring(
    size: int, pieces: int, batch: int, dtype: torch.dtype
) -> None:
    counts = deal(size * 5 + 1, size)  # the first rank has one token more
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(batch, count, size * 4, 3, generator=generator) for count in counts]

    def run(make: Callable[[int], HeadExchange]) -> list[list[Tensor]]:
        return on_threads(
            size, lambda rank: layers_of_attention(make(rank), tokens[rank].to(dtype), counts, pieces, 6)
        )

    room = Room(size)
    expected = run(lambda rank: CollectiveHeads(ThreadPeers(room, rank, size)))
    mailboxes = [ThreadMailbox(room, Random(rank)) for rank in range(size)]
    found = run(lambda rank: DirectHeads(mailboxes[rank], rank, size, pieces))
    for rank in range(size):
        for direct, collective in zip(found[rank], expected[rank], strict=True):
            assert torch.equal(direct.float(), collective.float())
        assert mailboxes[rank].numbers == list(range(4 * pieces)) * 6  # each slot has one use in a block


@pytest.mark.parametrize(("above", "below"), [(True, True), (True, False), (False, True), (False, False)])
def test_border_rows_by_direct_copies(above: bool, below: bool) -> None:
    """In every swap, a rank's window gets the border rows of its neighbours, and zeros beyond the picture."""
    size, rows = 3, 7
    room = Room(size)

    def work(rank: int) -> list[Tensor]:
        border = DirectBorder(ThreadMailbox(room, Random(rank), eager=True), rank, size)
        picture = PictureRows(ThreadPeers(room, rank, size), rows, border)
        found = []
        for turn in range(5):
            whole = torch.arange(2.0 * rows * 4 * 3).view(2, rows, 4, 3) + 1000 * turn
            own = picture.mine(whole)
            window = torch.full((2, own.shape[1] + above + below, 4, 3), -1.0)
            window[:, int(above) : window.shape[1] - int(below)] = own
            picture.border(window, above, below)
            found.append(window)
        return found

    for rank, windows in enumerate(on_threads(size, work)):
        first, last = starts(deal(rows, size))[rank], sum(deal(rows, size)[: rank + 1])
        for turn, window in enumerate(windows):
            whole = torch.arange(2.0 * rows * 4 * 3).view(2, rows, 4, 3) + 1000 * turn
            padded = torch.nn.functional.pad(whole, (0, 0, 0, 0, 1, 1))
            expected = padded[:, first + 1 - above : last + 1 + below]
            assert torch.equal(window, expected)


def test_what_leaves_is_held_until_it_has_been_waited_for() -> None:
    room = Room(2)
    counts = [2, 2]

    def work(rank: int) -> tuple[int, int]:
        heads = DirectHeads(ThreadMailbox(room, Random(0)), rank, 2)
        sent = heads.to_heads(torch.ones(1, 2, 4, 3), slice(0, 2), counts)
        held = sent._pending._held  # type: ignore[attr-defined]
        before = len(held)
        sent.wait()
        return before, len(held)

    assert on_threads(2, work) == [(1, 0), (1, 0)]


@pytest.mark.parametrize(
    ("reaches", "reason"),
    [
        ([Reach("a 1", 0, (1,)), Reach("a 1", 1, (0,))], None),
        ([Reach("a 1", -1, ()), Reach("a 1", -1, ())], "needs CUDA"),
        ([Reach("a 1", 0, (1,)), Reach("b 2", 1, (0,))], "the GPUs are in different machines (a, b)"),
        ([Reach("a 1", 0, ()), Reach("a 1", 1, (0,))], "GPU 0 cannot write into the memory of GPU 1"),
        (
            [Reach("a 1", 0, (1,)), Reach("a 1", 0, (1,))],
            "two processes use GPU number 0",
        ),
    ],
)
def test_direct_copies_need_gpus_that_access_each_other(reaches: list[Reach], reason: str | None) -> None:
    found = obstacle(reaches)
    assert found is None if reason is None else str(found).startswith(reason)


def arranged(team: Ranks) -> tuple[str | None, str | None, bool, str]:
    auto = team.arrange(Layout(1, 2, 4))
    captures = team.captures
    alone = team.arrange(Layout(2, 1, 4))
    try:
        team.arrange(Layout(1, 2, 4), "direct")
    except ResourceError as error:
        return auto, alone, captures, str(error)
    return auto, alone, captures, ""


def test_a_team_reports_its_exchange(pools: dict[int, RankPool]) -> None:
    for auto, alone, captures, refused in pools[2].run(arranged):
        assert auto == alone == "exchanges: gloo (no direct copies: needs CUDA)" and not captures
        assert (
            refused == "exchange: direct copies between GPUs are not possible: needs CUDA; use exchange=auto"
        )


def arranged_as_if_on_gpus(team: Ranks, machines: str) -> tuple[str | None, bool]:
    """The choice of `auto` for GPUs in these machines, one letter per rank."""
    numbers = range(len(machines))
    usual = team._reaches
    team._reaches = [Reach(f"{name} 1", rank, tuple(numbers)) for rank, name in enumerate(machines)]
    with mock.patch("omniavatar.parallel.team.SymmetricMailbox"):
        found = team.arrange(Layout(2, 2, 4)), team.captures
    team._reaches = usual
    team.arrange(Layout(2, 2, 4))
    return found


@pytest.mark.parametrize(
    ("machines", "expected", "captures"),
    [
        ("aaaa", "exchanges: direct copies between the GPUs", True),
        ("aabb", "exchanges: direct copies in attention, gloo elsewhere (no direct copies: ", True),
        ("abab", "exchanges: gloo (no direct copies: the GPUs are in different machines (a, b))", False),
    ],
)
def test_auto_copies_directly_where_it_can(
    pools: dict[int, RankPool], machines: str, expected: str, captures: bool
) -> None:
    for text, captured in pools[4].run(arranged_as_if_on_gpus, machines):
        assert text is not None and text.startswith(expected) and captured is captures


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["exchange=direct"], "exchange: one GPU makes the video.*set sp_size or cfg_parallel to 2 or more"),
        (["sp_size=2", "use_fsdp=true", "cuda_graphs=true"], "cuda_graphs.*use_fsdp"),
    ],
)
def test_settings_that_exclude_each_other(values: list[str], message: str) -> None:
    from omniavatar.config.load import load_config

    with pytest.raises(ConfigError, match=message):
        load_config(None, ["weights=random", "scale=nano", *values])
