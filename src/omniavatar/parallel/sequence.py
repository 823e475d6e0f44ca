"""One forward on several ranks: tokens are distributed before the blocks and gathered after them.

`shard` wraps any function with the signature of `WanDiT.run_blocks`: each rank gets a run of tokens with
their positions and the audio of their frames. Only self-attention needs the tokens of other ranks, and
`attention` wraps any `AttentionFn` for it. An all-to-all turns "my tokens, all heads" into "all tokens, my
heads", and another one turns the result back (Ulysses). If the number of ranks does not divide the heads,
groups of ranks also share the query tokens and gather the keys and values of their heads. A ring of partial
softmaxes would move the same bytes, but this is exact and works with every kernel.

A `HeadExchange` transports the heads; on CUDA it uses a separate stream. A fused block sends v, q and k as
soon as each is computed, so the transfer of v and q overlaps the next projection. It multiplies the result of
its own heads with the output layer while the results of the others arrive (`TravellingAttention`). With
`pieces`, heads are also sent in parts, so that the exchange of one part overlaps the attention of another.
With NCCL on two H100 this is slower: NCCL and FlashAttention-3 compete for multiprocessors, and fewer heads
fill the last wave less. In a forward of the 14B with 30,375 tokens, four pieces add 173 ms, and the exchanges
alone take 50 ms. The default is therefore one piece; more may help on a slow network.
Cost in quality: only the rounding of matrix products with other shapes.
Sources: DeepSpeed-Ulysses (arXiv 2309.14509), context parallelism of Llama 3 (arXiv 2407.21783).

Shapes: B batch, L all tokens, l tokens of this rank, H heads, D head dim, T latent frames, C width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from omniavatar.accel.sparse_blocks import OrderedAudio
from omniavatar.model.attention import AttentionFn, takes_float8
from omniavatar.model.dit import RunBlocks
from omniavatar.model.layers import AudioByToken, BlockInputs, TokenAudio
from omniavatar.model.rope import RopeTable
from omniavatar.parallel.exchange import Arriving, HeadExchange, RowExchange
from omniavatar.parallel.peers import Peers
from omniavatar.parallel.rank_layout import deal, starts


class SequenceParallel:
    """The part of one rank in every forward.

    whole: all ranks of the forward, in the order of their tokens.
    heads: the ranks with which it exchanges heads.
    rows: the ranks with the same heads of other tokens.
    pieces: number of parts in which heads are sent.
    """

    def __init__(self, whole: Peers, heads: HeadExchange, rows: RowExchange, pieces: int = 1) -> None:
        self.whole, self.heads, self.rows = whole, heads, rows
        self.pieces = pieces
        self.counts: list[int] = []

    def shard(self, run_blocks: RunBlocks) -> RunBlocks:
        """A function from all tokens (B, L, C) to all tokens that runs `run_blocks` on those of this rank."""

        def sharded(tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
            total = tokens_BLC.shape[1]
            self.counts = deal(total, self.whole.size)
            first, count = starts(self.counts)[self.whole.index], self.counts[self.whole.index]
            mine = slice(first, first + count)
            rope = RopeTable(inputs.rope.cos[mine], inputs.rope.sin[mine])
            audio: AudioByToken
            if isinstance(inputs.audio, AudioByToken):
                audio = OrderedAudio(inputs.audio.per_frame, inputs.audio.frames[mine])
            else:
                audio = TokenAudio(inputs.audio, first, count, total)
            local = BlockInputs(inputs.modulation, rope, inputs.text, audio)
            out_BlC = run_blocks(tokens_BLC[:, mine].contiguous(), local)
            return self.whole.gather(out_BlC.transpose(0, 1), self.counts).transpose(0, 1)

        return sharded

    def attention(self, inner: AttentionFn) -> SequenceAttention:
        """Self-attention over the tokens of all ranks, computed by `inner`."""
        return SequenceAttention(self, inner)


class SequenceAttention:
    """A `TravellingAttention` from the tokens (B, l, H, D) of this rank to the tokens of all ranks."""

    def __init__(self, team: SequenceParallel, inner: AttentionFn) -> None:
        self._team, self._inner = team, inner
        self.takes_float8 = takes_float8(inner)

    def __call__(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor) -> Tensor:
        return self.attend(*(self.send(x) for x in (q_BlHD, k_BlHD, v_BlHD)))

    def send(self, x_BlHD: Tensor) -> list[Arriving[Tensor]]:
        """One pending result for each piece of the heads."""
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
        first = starts(self._counts)[heads.index]
        parts = weight.chunk(heads.size, 1)
        mine = out[first : first + self._counts[heads.index]].flatten(-2)
        result = F.linear(mine, parts[heads.index], bias)
        del mine, out
        for index, arrived in enumerate(sent.wait()):
            if index != heads.index:
                rows = arrived.flatten(0, 1).flatten(1)
                result.view(-1, result.shape[-1]).addmm_(rows, parts[index].mT)
        return result.transpose(0, 1)

    @property
    def _counts(self) -> list[int]:
        """Tokens of each rank that shares heads with this one."""
        ranks, row = self._team.heads.size, self._team.rows.index
        return self._team.counts[row * ranks : (row + 1) * ranks]

    def _spans(self, heads: int) -> list[slice]:
        """The pieces of the heads that one rank computes."""
        ranks = self._team.heads.size
        share = heads // ranks
        pieces = deal(share, min(share, self._team.pieces) if ranks > 1 else 1)
        return [slice(first, first + size) for first, size in zip(starts(pieces), pieces, strict=True)]

    def _results(
        self, q: list[Arriving[Tensor]], k: list[Arriving[Tensor]], v: list[Arriving[Tensor]]
    ) -> Iterator[Tensor]:
        """Attention of each piece: (tokens of the head peers, B, heads of the piece, D)."""
        team = self._team
        size = team.heads.size
        row_counts = [sum(team.counts[first : first + size]) for first in range(0, len(team.counts), size)]
        for pending in zip(q, k, v, strict=True):
            whole_q, whole_k, whole_v = (each.wait() for each in pending)
            gathered = [team.rows.spread(each, row_counts) for each in (whole_k, whole_v)]
            whole_k, whole_v = (each.wait() for each in gathered)
            batch_first = (x.transpose(0, 1) for x in (whole_q, whole_k, whole_v))
            yield self._inner(*batch_first).transpose(0, 1)
