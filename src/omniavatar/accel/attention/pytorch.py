"""PyTorch's `scaled_dot_product_attention`, with one of its kernels or with its own choice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from omniavatar.model.attention import AttentionFn


def pytorch_attention(kernel: str | None) -> AttentionFn:
    """An `AttentionFn`. kernel: name of an `SDPBackend`; None leaves the choice to PyTorch at each call."""
    backend = None if kernel is None else SDPBackend.__members__[kernel]

    def pinned() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        with pinned():
            out = scaled_dot_product_attention(
                q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2)
            )
        return out.transpose(1, 2)

    return attention
