"""The prompt's keys without their padding, on a CPU.

Prompts are padded with zeros to 512 tokens, and the model attends to the padding as it does to words. All
padding has the same key and value, and a key that occurs m times in a softmax equals one key with log m added
to its score. So the words and one token of padding are kept; the added score is one more column of the keys.
What it loses: rounding only. What it gains: attention to the text costs only what the words cost, which saves
a seventh of a forward of the pocket model. With a GPU and real sizes it is a hundredth, so nothing is changed
there.

Shapes: B batch, S text tokens, H heads, D head dim, L video tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omniavatar.model.attention import AttentionFn
from omniavatar.model.dit import TextState, WanDiT


class WeightedKeys:
    """Attention whose keys may have one column more than the queries; the column is added to their scores."""

    def __init__(self, attention: AttentionFn) -> None:
        self.attention = attention

    def __call__(self, q_BLHD: Tensor, k_BSHE: Tensor, v_BSHD: Tensor) -> Tensor:
        width = q_BLHD.shape[-1]
        if k_BSHE.shape[-1] == width:
            return self.attention(q_BLHD, k_BSHE, v_BSHD)
        q, k, v = (each.transpose(1, 2) for each in (q_BLHD, k_BSHE, v_BSHD))
        out = scaled_dot_product_attention(q, k[..., :width], v, attn_mask=k[:, :, None, :, width])
        return out.transpose(1, 2)


def apply_short_text(dit: WanDiT) -> None:
    """Make the text attention of `dit` take the keys that `prepare_text` returns."""
    dit.text_attention = WeightedKeys(dit.text_attention)


def prepare_text(dit: WanDiT, embedding_BSE: Tensor) -> TextState:
    """`dit.prepare_text`, without the padding if `apply_short_text` was applied."""
    text = dit.prepare_text(embedding_BSE)
    if not isinstance(dit.text_attention, WeightedKeys):
        return text
    words = _words(embedding_BSE)
    if embedding_BSE.shape[1] - words < 2:
        return text
    return tuple((_weighted(k, words), v[:, : words + 1].contiguous()) for k, v in text)


def _words(embedding_BSE: Tensor) -> int:
    """Number of tokens before the padding, the largest of all rows."""
    used = (embedding_BSE != 0).any(-1).any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 0


def _weighted(k_BSHD: Tensor, words: int) -> Tensor:
    kept = k_BSHD[:, : words + 1]
    column = torch.zeros_like(kept[..., :1])
    column[:, words] = math.log(k_BSHD.shape[1] - words)
    return torch.cat([kept, column], dim=-1)
