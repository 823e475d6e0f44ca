"""One forward over several ranks: the tokens are dealt out before the blocks and gathered after them.

`shard` wraps anything of the signature of `WanDiT.run_blocks`: each rank gets its run of tokens with their
positions and the audio of their frames. Only self-attention looks beyond a rank's tokens, and `attention`
wraps any `AttentionFn` for it: an all-to-all turns "my tokens, all heads" into "all tokens, my heads" and
another one turns the result back (Ulysses). Where the ranks do not divide the heads, groups of ranks share
the query tokens besides, and gather the keys and values of their heads. That is what a ring of partial
softmaxes computes, with the same bytes moved, but it is exact and runs on every kernel.

How heads travel is an `exchange.HeadExchange`'s business; on CUDA they do on a stream of their own. A fused
block sends v, q and k as each is made, so v and q travel while the next projection runs, and multiplies its
own heads' result with the output layer while the others' come (`TravellingAttention`). Heads may go in
`pieces` besides, so that the exchange of one hides behind the attention of another. By NCCL on two H100 that
loses: it and FlashAttention-3 want the same multiprocessors, and fewer heads fill their last wave less (14B,
30,375 tokens, four pieces: 173 ms longer than without exchanges, which alone take 50). So one piece is the
default; where a network is slow, more may win.
What it loses: nothing but the rounding of matrix products of other shapes.
Sources: DeepSpeed-Ulysses (arXiv 2309.14509), context parallelism of Llama 3 (arXiv 2407.21783).

Shapes: B batch, L all tokens, l tokens of this rank, H heads, D head dim, T latent frames, C width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from omniavatar.model.attention import AttentionFn, takes_float8
from omniavatar.model.dit import RunBlocks
from omniavatar.model.layers import BlockInputs, TokenAudio
from omniavatar.model.rope import RopeTable
from omniavatar.parallel.exchange import Arriving, HeadExchange, RowExchange
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.rank_layout import deal, starts


class SequenceParallel:
    """The share of one rank in every forward.

    heads: the ranks it exchanges heads with. rows: the ranks that hold the same heads of other tokens.
    whole: all ranks of the forward, in the order of their tokens. pieces: see above.
    """

    def __init__(self, whole: Peers, heads: HeadExchange, rows: RowExchange, pieces: int = 1) -> None:
        self.whole, self.heads, self.rows = whole, heads, rows
        self.pieces = pieces
        self.counts: list[int] = []

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        """`run_blocks` on this rank's tokens; takes and gives all tokens (B, L, C)."""

        def sharded(tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
            total = tokens_BLC.shape[1]
            self.counts = deal(total, self.whole.size)
            first, count = starts(self.counts)[self.whole.index], self.counts[self.whole.index]
            mine = slice(first, first + count)
            rope = RopeTable(inputs.rope.cos[mine], inputs.rope.sin[mine])
            audio = TokenAudio(inputs.audio, first, count, total)
            local = BlockInputs(inputs.modulation, rope, inputs.text, audio)
            out_BlC = run_blocks(tokens_BLC[:, mine].contiguous(), local)
            return self.whole.gather(out_BlC.transpose(0, 1), self.counts).transpose(0, 1)

        return sharded

    def attention(self, inner: AttentionFn) -> SequenceAttention:
        """Self-attention over all ranks' tokens, by `inner`."""
        return SequenceAttention(self, inner)


class SequenceAttention:
    """A `TravellingAttention` of this rank's tokens (B, l, H, D) that attends to the tokens of all ranks."""

    def __init__(self, team: SequenceParallel, inner: AttentionFn) -> None:
        self._team, self._inner = team, inner
        self.takes_float8 = takes_float8(inner)

    def __call__(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor) -> Tensor:
        return self.attend(*(self.send(x) for x in (q_BlHD, k_BlHD, v_BlHD)))

    def send(self, x_BlHD: Tensor) -> list[Arriving[Tensor]]:
        """One parcel for each piece of the heads."""
        spans = self._spans(x_BlHD.shape[2])
        return [self._team.heads.to_heads(x_BlHD, span, self._counts) for span in spans]

    def attend(
        self, q: list[Arriving[Tensor]], k: list[Arriving[Tensor]], v: list[Arriving[Tensor]]
    ) -> Tensor:
        sent = [self._team.heads.to_tokens(out, self._counts) for out in self._results(q, k, v)]
        by_piece = [each.wait() for each in sent]
        rows = [part for by_rank in zip(*by_piece, strict=True) for part in by_rank]
        return torch.cat([row.transpose(0, 1) for row in rows], 2)

    def attend_linear(
        self,
        q: list[Arriving[Tensor]],
        k: list[Arriving[Tensor]],
        v: list[Arriving[Tensor]],
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        heads = self._team.heads
        if heads.size == 1 or len(q) > 1:
            return F.linear(self.attend(q, k, v).flatten(-2), weight, bias)
        (out,) = self._results(q, k, v)
        sent = heads.to_tokens(out, self._counts)
        here = starts(self._counts)[heads.index]
        parts = weight.chunk(heads.size, 1)
        mine = out[here : here + self._counts[heads.index]].flatten(-2)
        made = F.linear(mine, parts[heads.index], bias)
        del mine, out
        for index, arrived in enumerate(sent.wait()):
            if index != heads.index:
                rows = arrived.flatten(0, 1).flatten(1)
                made.view(-1, made.shape[-1]).addmm_(rows, parts[index].mT)
        return made.transpose(0, 1)

    @property
    def _counts(self) -> list[int]:
        """Tokens of each of the ranks that share the heads of the same tokens."""
        ranks, row = self._team.heads.size, self._team.rows.index
        return self._team.counts[row * ranks : (row + 1) * ranks]

    def _spans(self, heads: int) -> list[slice]:
        """Pieces of the heads that one rank attends with."""
        ranks = self._team.heads.size
        share = heads // ranks
        pieces = deal(share, min(share, self._team.pieces) if ranks > 1 else 1)
        return [slice(first, first + size) for first, size in zip(starts(pieces), pieces, strict=True)]

    def _results(
        self, q: list[Arriving[Tensor]], k: list[Arriving[Tensor]], v: list[Arriving[Tensor]]
    ) -> Iterator[Tensor]:
        """Attention of each piece, (tokens of the head peers, B, heads of the piece, D)."""
        team = self._team
        size = team.heads.size
        row_counts = [sum(team.counts[first : first + size]) for first in range(0, len(team.counts), size)]
        for parcels in zip(q, k, v, strict=True):
            whole_q, whole_k, whole_v = (parcel.wait() for parcel in parcels)
            spread = [team.rows.spread(each, row_counts) for each in (whole_k, whole_v)]
            whole_k, whole_v = (each.wait() for each in spread)
            moved = (x.transpose(0, 1) for x in (whole_q, whole_k, whole_v))
            yield self._inner(*moved).transpose(0, 1)
