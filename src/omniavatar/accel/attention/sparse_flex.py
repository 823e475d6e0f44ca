"""Block-sparse attention by PyTorch's FlexAttention, for CUDA GPUs without another fast backend.

What is kept is exact. The last block may be shorter than the others, so it is listed apart and masked by
token; the others are computed without a mask. Blocks have a multiple of 128 tokens.
Source: FlexAttention (arXiv 2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from omniavatar.accel.attention.sparse import BlockLists, check_tokens


class FlexSparseAttention:
    """A `SparseAttentionFn`. flex: `flex_attention`, compiled or not."""

    def __init__(self, flex: Callable[..., Any]) -> None:
        self._flex = flex
        self._masks: WeakKeyDictionary[BlockLists, BlockMask] = WeakKeyDictionary()

    @classmethod
    def compiled(cls) -> FlexSparseAttention:
        """Compiled at the first call for each shape."""
        return cls(torch.compile(flex_attention, dynamic=False))

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, lists: BlockLists) -> Tensor:
        check_tokens(q_BLHD, k_BLHD, lists)
        if lists not in self._masks:
            self._masks[lists] = block_mask(lists)
        q, k, v = (each.transpose(1, 2) for each in (q_BLHD, k_BLHD, v_BLHD))
        out: Tensor = self._flex(q, k, v, block_mask=self._masks[lists])
        return out.transpose(1, 2)


def block_mask(lists: BlockLists) -> BlockMask:
    """The lists in PyTorch's form: the row's last block masked by token, the others whole."""
    kept = lists.kept()
    block, tokens = lists.block, lists.tokens

    def listed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[head, query // block, key // block]

    blocks = kept.shape[-1]
    partial = torch.zeros_like(kept)
    partial[..., blocks - 1] = kept[..., blocks - 1]
    whole = kept & ~partial
    masked_counts, masked = _lists(partial)
    whole_counts, unmasked = _lists(whole)
    return BlockMask.from_kv_blocks(
        masked_counts,
        masked,
        whole_counts,
        unmasked,
        BLOCK_SIZE=block,
        mask_mod=listed,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )


def _lists(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (1, H, Q) and indices (1, H, Q, K) of a table (H, Q, K)."""
    listed_first = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None], listed_first.to(torch.int32)[None]
