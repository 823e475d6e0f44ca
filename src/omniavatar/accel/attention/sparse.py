"""Attention that computes only some blocks: the eager twin, and flash-attn-4 on Hopper.

A `SparseAttentionFn` is an `AttentionFn` that also takes `BlockLists`: for each head and each block of
queries the blocks of keys it attends to. What is kept is computed exactly; the softmax runs over it alone.
The flash-attn-4 form (package `flash-attn-4`, a pre-release) takes bf16 or fp16, 128 tokens a block; measured
on an H100 it agrees with the twin to 2e-3 and takes the time of what is kept, 630 to 690 TFLOP/s.

Shapes: B batch, L tokens, H heads, D head dim, Q K blocks of queries and keys, N blocks of the longest list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

MASK_VALUES = 2**28
"""Entries of the mask of one call of the twin, at most, where a block of queries has fewer."""
MASS_VALUES = 2**26
"""Scores that `block_mass` holds at once, where a block of queries of one head has fewer."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The kept blocks of keys of each head and block of queries.

    counts: (H, Q) int32, at least 1. indices: (H, Q, N) int32, the first `count` of a row, falling; then 0.
    block: tokens of a block. tokens: L, so the last block may be shorter.
    """

    counts: Tensor
    indices: Tensor
    block: int
    tokens: int

    @classmethod
    def of(cls, kept_HQK: Tensor, block: int, tokens: int) -> BlockLists:
        """Lists on the device of `kept`, a boolean table. Raises ValueError for a row that keeps nothing."""
        blocks = -(-tokens // block)
        if kept_HQK.shape[1:] != (blocks, blocks):
            raise ValueError(
                f"{tokens} tokens in blocks of {block} are {blocks} blocks, but the table of kept blocks is "
                f"{tuple(kept_HQK.shape)}"
            )
        counts = kept_HQK.sum(-1, dtype=torch.int32)
        if int(counts.min()) < 1:
            raise ValueError("every block of queries must keep a block of keys")
        numbers = torch.arange(blocks, dtype=torch.int32, device=kept_HQK.device)
        falling = torch.where(kept_HQK, numbers, -1).sort(-1, descending=True).values
        longest = int(counts.max())
        return cls(counts, falling[..., :longest].clamp_min(0).contiguous(), block, tokens)

    def kept(self) -> Tensor:
        """The table (H, Q, K) that the lists were made of."""
        heads, rows, longest = self.indices.shape
        listed = torch.arange(longest, device=self.counts.device) < self.counts[..., None]
        table = torch.zeros(heads, rows, rows + 1, dtype=torch.bool, device=self.counts.device)
        table.scatter_(-1, torch.where(listed, self.indices, rows).long(), True)
        return table[..., :rows]

    def heads(self, part: slice) -> BlockLists:
        """The lists of some of the heads."""
        return BlockLists(self.counts[part], self.indices[part], self.block, self.tokens)

    @cached_property
    def last_and_rest(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts and indices of each row's last block, and of the others, as (1, H, Q, ..)."""
        rest = self.indices[..., 1:] if self.indices.shape[-1] > 1 else self.indices
        lists = (torch.ones_like(self.counts), self.indices[..., :1], self.counts - 1, rest)
        counts, last, others, rest = (each[None].contiguous() for each in lists)
        return counts, last, others, rest


SparseAttentionFn = Callable[[Tensor, Tensor, Tensor, BlockLists], Tensor]


def eager_sparse_attention(
    q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists, mask_values: int = MASK_VALUES
) -> Tensor:
    """The twin, on any device and at any block size: PyTorch's attention under a mask, in the dtype of q."""
    check_tokens(q_BLHD, k_BLHD, lists)
    q, k, v = (each.transpose(1, 2) for each in (q_BLHD, k_BLHD, v_BLHD))
    kept = lists.kept()
    rows = max(1, mask_values // (kept.shape[0] * lists.block * lists.tokens))
    parts = []
    for first in range(0, kept.shape[1], rows):
        begin, end = first * lists.block, min(lists.tokens, (first + rows) * lists.block)
        by_key = kept[:, first : first + rows].repeat_interleave(lists.block, -1)[..., : lists.tokens]
        mask = by_key.repeat_interleave(lists.block, 1)[:, : end - begin]
        parts.append(scaled_dot_product_attention(q[:, :, begin:end], k, v, attn_mask=mask))
    return torch.cat(parts, 2).transpose(1, 2)


def block_mass(q_BLHD: Tensor, k_BLHD: Tensor, block: int, values: int = MASS_VALUES) -> Tensor:
    """The mean share of each block of queries that the softmax gives each block of keys, (H, Q, K) float32.

    Mean over the batch. Every score is computed, in float32: a block of queries at a time, of as many heads
    as `values` scores allow. Equal inputs give equal bits.
    """
    tokens, heads = q_BLHD.shape[1:3]
    blocks, scale = -(-tokens // block), q_BLHD.shape[-1] ** -0.5
    some = max(1, values // (len(q_BLHD) * block * tokens))
    parts = []
    for first in range(0, heads, some):
        q, k = (each[:, :, first : first + some].transpose(1, 2).float() for each in (q_BLHD, k_BLHD))
        rows = []
        for begin in range(0, tokens, block):
            weights = (q[:, :, begin : begin + block] * scale @ k.mT).softmax(-1).mean((0, 2))
            padded = pad(weights, (0, blocks * block - tokens))
            rows.append(padded.unflatten(-1, (blocks, block)).sum(-1))
        parts.append(torch.stack(rows, 1))
    return torch.cat(parts)


def check_tokens(q_BLHD: Tensor, k_BLHD: Tensor, lists: BlockLists) -> None:
    """Raises ValueError where the lists are for other tokens or heads."""
    expected = (lists.tokens, lists.counts.shape[0])
    if q_BLHD.shape[1:3] != expected or k_BLHD.shape[1:3] != expected:
        raise ValueError(
            f"lists for {expected[0]} tokens and {expected[1]} heads do not fit queries "
            f"{tuple(q_BLHD.shape)} and keys {tuple(k_BLHD.shape)}"
        )


class Fa4SparseAttention:
    """A `SparseAttentionFn` on flash-attn-4, for Hopper GPUs; blocks of 128 tokens."""

    BLOCK = 128

    def __init__(self, forward: Callable[..., Any], tensors: Callable[..., Any]) -> None:
        self._forward, self._tensors = forward, tensors

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists) -> Tensor:
        check_tokens(q_BLHD, k_BLHD, lists)
        if lists.block != self.BLOCK:
            raise ValueError(f"flash-attn-4 takes blocks of {self.BLOCK} tokens, not of {lists.block}")
        size = (self.BLOCK, self.BLOCK)
        sparse = self._tensors(*lists.last_and_rest, block_size=size)
        out: Tensor = self._forward(q_BLHD, k_BLHD, v_BLHD, block_sparse_tensors=sparse)[0]
        return out


def create_fa4_sparse() -> Fa4SparseAttention:
    """The backend on flash-attn-4. Raises ImportError where the package is not installed."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    return Fa4SparseAttention(_flash_attn_fwd, BlockSparseTensorsTorch)
