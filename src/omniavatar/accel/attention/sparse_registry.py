"""Backends of sparse attention by name: one record here is all a new one needs.

Every backend is a `SparseAttentionFn` (`accel.attention.sparse`): q, k and v (B, L, H, D) and the lists of
kept blocks. `create` takes the device. `auto` looks at the backend of dense attention: the float8 kernel has
an error of float8, so it is taken only where dense attention has one too.

A layer that keeps nearly everything is faster with dense attention. `break_even` says from which share on, by
pair of backends, heads and tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omniavatar.device import Backend, Registry, capability, installed, precision_name
from omniavatar.errors import ResourceError

if TYPE_CHECKING:
    import torch

    from omniavatar.accel.attention.sparse import SparseAttentionFn

FLOAT8_ATTENTION = "fa3_fp8"
FAST_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class SparseBackend(Backend):
    """A backend of sparse attention.

    - block: the tokens of a block must be a multiple of it.
    - most_block: the largest block; None: any.
    - head_dims: the channels of a head that it takes; () for all.
    - fast: whether it takes less time than dense attention; the twin does not.
    """

    block: int = 1
    most_block: int | None = None
    head_dims: tuple[int, ...] = ()
    fast: bool = True

    def takes(self, block: int) -> bool:
        """Whether blocks may have `block` tokens."""
        return block % self.block == 0 and (self.most_block is None or block <= self.most_block)


def _eager(device: torch.device) -> SparseAttentionFn:
    from omniavatar.accel.attention.sparse import eager_sparse_attention

    return eager_sparse_attention


def _fa4(device: torch.device) -> SparseAttentionFn:
    from omniavatar.accel.attention.sparse import create_fa4_sparse

    return create_fa4_sparse()


def _float8(device: torch.device) -> SparseAttentionFn:
    from omniavatar.accel.attention.sparse_float8 import Float8SparseAttention

    return Float8SparseAttention()


def _flex(device: torch.device) -> SparseAttentionFn:
    from omniavatar.accel.attention.sparse_flex import FlexSparseAttention

    return FlexSparseAttention.compiled()


def _without_fa4(device: torch.device) -> str | None:
    usable = capability(device)[0] == 9 and installed("flash_attn") and installed("flash_attn.cute")
    return None if usable else "it needs a Hopper GPU and `pip install --pre flash-attn-4`"


def _without_gluon(device: torch.device) -> str | None:
    usable = capability(device)[0] == 9 and installed("triton") and installed("triton.experimental.gluon")
    return None if usable else "it needs a Hopper GPU and Triton 3.6 or later"


def _without_flex(device: torch.device) -> str | None:
    usable = device.type == "cuda" and installed("triton")
    return None if usable else "it needs a CUDA GPU and `pip install triton`"


def _only_cpu(device: torch.device, *facts: Any) -> bool:
    return device.type == "cpu"


def _fits_fa4(device: torch.device, dtype: torch.dtype, attention: str, block: int, head_dim: int) -> bool:
    return precision_name(dtype) in ("bf16", "fp16") and block == FAST_BLOCK and head_dim == 128


def _fits_float8(device: torch.device, dtype: torch.dtype, attention: str, block: int, head_dim: int) -> bool:
    return attention == FLOAT8_ATTENTION and block == FAST_BLOCK and head_dim == 128


def _fits_flex(device: torch.device, dtype: torch.dtype, attention: str, block: int, head_dim: int) -> bool:
    return block % FAST_BLOCK == 0


SPARSE: Registry[SparseBackend] = Registry(
    "sparsity.sparse_backend",
    SparseBackend(
        name="eager",
        create=_eager,
        exact=True,
        doc="PyTorch's attention under a mask: any device and block size, no faster than dense.",
        rank=10,
        suits=_only_cpu,
        fast=False,
    ),
    SparseBackend(
        name="flex",
        create=_flex,
        exact=True,
        doc="PyTorch's compiled FlexAttention with a block mask.",
        needs="CUDA GPU, package triton",
        unavailable=_without_flex,
        rank=20,
        suits=_fits_flex,
        block=FAST_BLOCK,
    ),
    SparseBackend(
        name="fa4",
        create=_fa4,
        exact=True,
        doc="FlashAttention-4's block-sparse kernel in bf16: the fastest exact one on Hopper.",
        needs="Hopper GPU, package flash-attn-4",
        unavailable=_without_fa4,
        rank=30,
        suits=_fits_fa4,
        dtypes=("bf16", "fp16"),
        block=FAST_BLOCK,
        most_block=FAST_BLOCK,
        head_dims=(128,),
    ),
    SparseBackend(
        name="float8",
        create=_float8,
        exact=False,
        doc="A kernel of this package in float8: the fastest on Hopper, 0.3 to 1.8 % error an attention.",
        needs="Hopper GPU, Triton 3.6 or later",
        unavailable=_without_gluon,
        rank=40,
        suits=_fits_float8,
        dtypes=("bf16", "fp16"),
        block=FAST_BLOCK,
        most_block=FAST_BLOCK,
        head_dims=(128,),
    ),
    words=("auto",),
    unknown=ResourceError,
)

SIZES = ((40, 30375), (40, 15750), (12, 30375), (12, 15750))
"""Heads and tokens of the measured forwards: the 14B and the 1.3B, two lengths of windows."""


def _by_size(*shares: float) -> dict[tuple[int, int], float]:
    return dict(zip(SIZES, shares, strict=True))


BREAK_EVEN = {
    ("fa4", FLOAT8_ATTENTION): _by_size(0.71, 0.70, 0.71, 0.73),
    ("float8", FLOAT8_ATTENTION): _by_size(0.89, 0.87, 0.90, 0.90),
    ("fa4", "fa3"): _by_size(0.93, 0.92, 0.93, 0.90),
}
"""By sparse and dense backend, then heads and tokens: the kept share above which dense attention is faster.

Whole forwards of the 14B and the 1.3B on one H100, a line through 35 and 100 % kept
(`benchmarks/results/2026-11-28_h100_sparse.jsonl`, `python -m benchmarks sparse`).
"""


def break_even(sparse: str, dense: str, heads: int, tokens: int) -> float:
    """The share above which a layer runs dense; 1 where none was measured, so that the plan is followed.

    The measured size nearest in the logarithms of heads and tokens counts.

    - heads: of the whole model, so that a plan is the same on any number of GPUs.
    """
    measured = BREAK_EVEN.get((sparse, dense))
    if measured is None:
        return 1.0

    def distance(size: tuple[int, int]) -> float:
        return math.hypot(math.log(size[0] / heads), math.log(size[1] / tokens))

    return measured[min(measured, key=distance)]


def choose_sparse(
    name: str, device: torch.device, dtype: torch.dtype, attention: str, block: int, head_dim: int
) -> SparseBackend:
    """The sparse backend called `name`, or what `auto` stands for.

    - attention: the backend of dense attention.
    - block: tokens of a block. head_dim: channels of a head.

    Raises ResourceError if it cannot be used here.
    """
    try:
        found = SPARSE.resolve(name, device, dtype, attention, block, head_dim)
    except ResourceError:
        if name != "auto":
            raise
        raise ResourceError(
            f"sparse_attention: no fast backend takes blocks of {block} tokens and heads of {head_dim} "
            f"channels on {device.type}; set sparse_block_size to {FAST_BLOCK}, sparse_backend to eager "
            "(slow), or sparse_attention to dense"
        ) from None
    if not found.takes(block):
        raise ResourceError(
            f"sparse_block_size: {found.name} takes blocks of {found.block} tokens, not of {block}; set "
            f"sparse_block_size to {found.block} or sparse_backend to eager"
        )
    if found.head_dims and head_dim not in found.head_dims:
        raise ResourceError(
            f"sparse_backend: {found.name} takes heads of {found.head_dims[0]} channels, this model has "
            f"{head_dim}; use flex, or eager (slow)"
        )
    if found.dtypes and precision_name(dtype) not in found.dtypes:
        raise ResourceError(
            f"sparse_backend: {found.name} computes in {' and '.join(found.dtypes)}, not in "
            f"{precision_name(dtype)}; set dtype to {found.dtypes[0]} or sparse_backend to eager"
        )
    return found
