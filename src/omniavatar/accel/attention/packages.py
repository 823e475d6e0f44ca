"""Attention of optional packages and of PyTorch's compiler: SageAttention, FlexAttention.

SageAttention (package `sageattention`, Ampere and later) takes q and k in int8 with a scale a block after the
keys' mean is taken off, v in fp16: on cards without float8 units the fastest there is, at a few per cent of
error (1.0.6 measured on an H100: 43 ms for 40 heads x 30,375 tokens against cuDNN's 32, so not for Hopper).
It subtracts the mean from the keys in place, and keys of the text are kept for the whole prompt: short keys
stay with PyTorch. Source: SageAttention (arXiv 2410.02367).
FlexAttention is PyTorch's compiled template: exact, for cards and versions where cuDNN is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORT_KEYS = 1024


class SageAttention:
    """An `AttentionFn` on SageAttention; keys shorter than 1,024 go through PyTorch's own."""

    def __init__(self) -> None:
        from sageattention import sageattn

        self._sage: Callable[..., Any] = sageattn

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        if k_BSHD.shape[1] < SHORT_KEYS:
            q, k, v = q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2)
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self._sage(q_BLHD, k_BSHD, v_BSHD, tensor_layout="NHD", is_causal=False)
        return out


class FlexAttention:
    """An `AttentionFn` on `torch.nn.attention.flex_attention`, compiled at its first call for a shape."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self._flex: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        out: Tensor = self._flex(*(each.transpose(1, 2) for each in (q_BLHD, k_BSHD, v_BSHD)))
        return out.transpose(1, 2)
