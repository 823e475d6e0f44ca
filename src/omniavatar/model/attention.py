"""The attention function that a DiT calls, and what a wrapper may add to it.

Shapes: B batch, L query tokens, S key tokens, H heads, D head dim. An `AttentionFn` takes q (B, L, H, D),
k and v (B, S, H, D) and returns (B, L, H, D): softmax scale 1/sqrt(D), no mask, dtype of q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


@runtime_checkable
class TravellingAttention(Protocol):
    """An `AttentionFn` whose inputs travel to other processes, and whose result travels back.

    A fused block sends each input as soon as it is made, so that the transfer overlaps with the computation
    of the next input. `__call__(q, k, v)` sends the three and returns `attend` of them.
    """

    def __call__(self, q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor: ...

    def send(self, x_BLHD: Tensor) -> Any:
        """Start to send q, k or v; every process must send its three in the same order."""

    def attend(self, q: Any, k: Any, v: Any) -> Tensor:
        """The result (B, L, H, D) for inputs that were sent."""

    def attend_linear(self, q: Any, k: Any, v: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`linear` of the result with its heads concatenated: (B, L, rows of `weight`).

        The product with the local heads runs while the others arrive.
        """


def takes_float8(attention: AttentionFn) -> bool:
    """Whether the backend, or the one it wraps, takes q and k in float8 (attribute `takes_float8`)."""
    return getattr(attention, "takes_float8", False)
