"""One forward over several ranks: the tokens are dealt out before the blocks and gathered after them.

`shard` wraps anything of the signature of `WanDiT.run_blocks`: each rank gets its run of tokens with their
positions and the audio of their frames. Only self-attention looks beyond a rank's tokens, and `attention`
wraps any `AttentionFn` for it: an all-to-all turns "my tokens, all heads" into "all tokens, my heads" and
another one turns the result back (Ulysses). Where the ranks do not divide the heads, groups of ranks share
the query tokens besides, and gather the keys and values of their heads. That is what a ring of partial
softmaxes computes, with the same bytes moved, but it is exact and runs on every kernel.

On CUDA the exchanges run on a stream of their own, and q, k and v travel side by side. Heads may go in
`pieces`, so that the exchange of one hides behind the attention of another. On two H100 that loses: NCCL and
FlashAttention-3 want the same multiprocessors, and fewer heads fill their last wave less (14B, 30,375
tokens, four pieces: 173 ms longer than without exchanges, which alone take 50). So one piece is the default;
where a network is slow, more may win.
What it loses: nothing but the rounding of matrix products of other shapes.
Sources: DeepSpeed-Ulysses (arXiv 2309.14509), context parallelism of Llama 3 (arXiv 2407.21783).

Shapes: B batch, L all tokens, l tokens of this rank, H heads, D head dim, T latent frames, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from omniavatar.model.dit import RunBlocks
from omniavatar.model.layers import BlockInputs
from omniavatar.model.rope import RopeTable
from omniavatar.ops.attention import AttentionFn, takes_float8
from omniavatar.parallel.layout import deal, starts
from omniavatar.parallel.peers import Peers, Pending


class SequenceParallel:
    """The share of one rank in every forward.

    heads: the ranks it exchanges heads with. rows: the ranks that hold the same heads of other tokens.
    whole: all ranks of the forward, in the order of their tokens. pieces: see above.
    """

    def __init__(self, whole: Peers, heads: Peers, rows: Peers, pieces: int = 1) -> None:
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
            audio = _PerToken(inputs.audio, mine, total)
            local = BlockInputs(inputs.modulation, rope, inputs.text, audio)
            out_BlC = run_blocks(tokens_BLC[:, mine].contiguous(), local)
            return self.whole.gather(out_BlC.transpose(0, 1), self.counts).transpose(0, 1)

        return sharded

    def attention(self, inner: AttentionFn) -> SequenceAttention:
        """Self-attention over all ranks' tokens, by `inner`."""
        return SequenceAttention(self, inner)


class SequenceAttention:
    """An `AttentionFn` of this rank's tokens (B, l, H, D) that attends to the tokens of all ranks."""

    def __init__(self, team: SequenceParallel, inner: AttentionFn) -> None:
        self._team, self._inner = team, inner
        self.takes_float8 = takes_float8(inner)

    def __call__(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor) -> Tensor:
        team = self._team
        batch, tokens, heads = q_BlHD.shape[:3]
        ranks = team.heads.size
        row = team.rows.index
        counts = team.counts[row * ranks : (row + 1) * ranks]
        row_counts = [sum(team.counts[first : first + ranks]) for first in range(0, len(team.counts), ranks)]
        share = heads // ranks
        pieces = deal(share, min(share, team.pieces) if ranks > 1 else 1)
        spans = [slice(first, first + size) for first, size in zip(starts(pieces), pieces, strict=True)]
        arriving = [[self._to_heads(x, span, counts) for x in (q_BlHD, k_BlHD, v_BlHD)] for span in spans]
        leaving = []
        for parts in arriving:
            q, k, v = (part.wait() for part in parts)
            if team.rows.size > 1:
                k, v = team.rows.gather(k, row_counts), team.rows.gather(v, row_counts)
            out = self._inner(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
            leaving.append(self._to_tokens(out, counts))
        size = q_BlHD.shape[-1]
        whole = leaving[0].wait().new_empty((batch, tokens, ranks, share, size))
        for span, pending in zip(spans, leaving, strict=True):
            part = pending.wait().reshape(ranks, tokens, batch, -1, size)
            whole[:, :, :, span] = part.permute(2, 1, 0, 3, 4)
        return whole.flatten(2, 3)

    def _to_heads(self, x_BlHD: Tensor, span: slice, counts: list[int]) -> Pending:
        """Rows (tokens of the head peers, B, heads of the span, D), on their way."""
        peers = self._team.heads
        if peers.size == 1:
            return Pending(x_BlHD[:, :, span].transpose(0, 1), None)
        parts = x_BlHD.unflatten(2, (peers.size, -1))[:, :, :, span]
        rows = parts.permute(2, 1, 0, 3, 4).flatten(0, 1)
        return peers.all_to_all(rows, [counts[peers.index]] * peers.size, counts)

    def _to_tokens(self, out: Tensor, counts: list[int]) -> Pending:
        """Rows (part of the heads, own tokens; B, heads of the span, D), on their way."""
        peers = self._team.heads
        if peers.size == 1:
            return Pending(out, None)
        return peers.all_to_all(out, counts, [counts[peers.index]] * peers.size)


class _PerToken(Sequence[Tensor | None]):
    """Audio (B, T, C) of each block as the vectors (B, l, C) of a run of tokens, made when a block asks."""

    def __init__(self, audio: Sequence[Tensor | None], tokens: slice, total: int) -> None:
        self._audio, self._tokens, self._total = audio, tokens, total

    def __len__(self) -> int:
        return len(self._audio)

    @overload
    def __getitem__(self, index: int) -> Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor | None]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor | None] | None:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        frame_BTC = self._audio[index]
        if frame_BTC is None:
            return None
        per_frame = self._total // frame_BTC.shape[1]
        token = torch.arange(self._tokens.start, self._tokens.stop, device=frame_BTC.device)
        return frame_BTC.index_select(1, token // per_frame)
