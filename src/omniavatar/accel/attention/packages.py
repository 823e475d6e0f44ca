"""Attention of an optional package and of PyTorch's compiler: SageAttention, FlexAttention.

SageAttention (package `sageattention`, Ampere and later) takes q and k in int8 with one scale for each block
of tokens, after it has subtracted the mean of the keys, and v in fp16. It is the fastest on GPUs without
float8 units, at a few per cent of error. On Hopper it is slower than cuDNN (version 1.0.6 on an H100, 40
heads x 30,375 tokens: 43 ms against 32). It changes the keys in place, but keys of the text are kept for the
whole prompt: short keys run through PyTorch. Source: SageAttention (arXiv 2410.02367). FlexAttention is
PyTorch's compiled template: exact, for GPUs and versions without cuDNN's kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORT_KEYS = 1024


class SageAttention:
    """An `AttentionFn` on SageAttention; keys shorter than 1,024 run through PyTorch."""

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
    """An `AttentionFn` on `torch.nn.attention.flex_attention`, compiled at the first call for each shape."""

    def __init__(self) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self._flex: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        out: Tensor = self._flex(*(each.transpose(1, 2) for each in (q_BLHD, k_BSHD, v_BSHD)))
        return out.transpose(1, 2)
