"""Attention backends by name, behind one signature: one record here is all a new backend needs.

Shapes: B batch, L query tokens, S key tokens, H heads, D head dim. Every backend is an `AttentionFn`:
q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D), softmax scale 1/sqrt(D), no mask, dtype of q.
`auto` and `fastest` choose once, before the run, and never fall back while it runs. `auto` takes the best
rank; `fastest` times the exact backends that have a rank (`accel.attention.timing`). Lossy ones have no rank:
they are used by name only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from omniavatar.device import Backend, Registry, capability, installed, precision_name
from omniavatar.errors import ResourceError

if TYPE_CHECKING:
    import torch

    from omniavatar.model.attention import AttentionFn


def _pytorch(kernel: str | None) -> Callable[[torch.device], AttentionFn]:
    def create(device: torch.device) -> AttentionFn:
        from omniavatar.accel.attention.pytorch import pytorch_attention

        return pytorch_attention(kernel)

    return create


def _fa3(device: torch.device) -> AttentionFn:
    from omniavatar.accel.attention.fa3 import Fa3Attention

    return Fa3Attention()


def _fa3_fp8(device: torch.device) -> AttentionFn:
    from omniavatar.accel.attention.fa3 import Fa3Float8Attention
    from omniavatar.accel.kernels.fused import create_fused

    return Fa3Float8Attention(create_fused(device))


def _sage(device: torch.device) -> AttentionFn:
    from omniavatar.accel.attention.packages import SageAttention

    return SageAttention()


def _flex(device: torch.device) -> AttentionFn:
    from omniavatar.accel.attention.packages import FlexAttention

    return FlexAttention()


def _without_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it needs a CUDA GPU, the device is {device.type}"


def _without_fa3(device: torch.device) -> str | None:
    usable = capability(device)[0] == 9 and installed("fa3_fwd_interface")
    return None if usable else "FlashAttention-3 needs a Hopper GPU and `pip install fa3-fwd`"


def _without_flex(device: torch.device) -> str | None:
    usable = device.type == "cuda" and installed("triton")
    return None if usable else "FlexAttention needs a CUDA GPU and `pip install triton`"


def _without_sage(device: torch.device) -> str | None:
    usable = capability(device)[0] >= 8 and installed("triton") and installed("sageattention")
    return None if usable else "SageAttention needs an Ampere GPU or later and `pip install sageattention`"


def _half_on_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype.itemsize == 2 and capability(device)[0] >= 9


def _only_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    return precision_name(dtype) == "bf16"


def _only_if_measured(device: torch.device, dtype: torch.dtype) -> bool:
    return False


ATTENTION: Registry[Backend] = Registry(
    "runtime.attention",
    Backend(
        name="sdpa",
        create=_pytorch(None),
        exact=True,
        doc="PyTorch's own choice among its kernels.",
        rank=10,
    ),
    Backend(
        name="math",
        create=_pytorch("MATH"),
        exact=True,
        doc="PyTorch's plain matrix products: slow, the reference for the others.",
    ),
    Backend(
        name="flash",
        create=_pytorch("FLASH_ATTENTION"),
        exact=True,
        doc="FlashAttention-2 as PyTorch ships it.",
        rank=40,
        suits=_only_if_measured,
    ),
    Backend(
        name="efficient",
        create=_pytorch("EFFICIENT_ATTENTION"),
        exact=True,
        doc="PyTorch's memory-efficient kernel, also for float32.",
        needs="CUDA GPU",
        unavailable=_without_cuda,
        rank=20,
        suits=_only_if_measured,
    ),
    Backend(
        name="cudnn",
        create=_pytorch("CUDNN_ATTENTION"),
        exact=True,
        doc="cuDNN's kernel: the fastest exact one on Hopper without fa3-fwd.",
        needs="CUDA GPU",
        unavailable=_without_cuda,
        rank=50,
        suits=_half_on_hopper,
    ),
    Backend(
        name="flex",
        create=_flex,
        exact=True,
        doc="PyTorch's compiled FlexAttention, for GPUs and versions without cuDNN's kernel.",
        needs="CUDA GPU, package triton",
        unavailable=_without_flex,
        rank=30,
        suits=_only_if_measured,
    ),
    Backend(
        name="sage",
        create=_sage,
        exact=False,
        doc="SageAttention, q and k in int8: a few per cent of error, fast on Ampere and Ada.",
        needs="Ampere GPU or later, package sageattention",
        unavailable=_without_sage,
    ),
    Backend(
        name="fa3",
        create=_fa3,
        exact=True,
        doc="FlashAttention-3 in bf16: the fastest exact one on Hopper.",
        needs="Hopper GPU, package fa3-fwd",
        unavailable=_without_fa3,
        rank=60,
        suits=_only_bf16,
        dtypes=("bf16",),
    ),
    Backend(
        name="fa3_fp8",
        create=_fa3_fp8,
        exact=False,
        doc="FlashAttention-3 in float8: about 3 % error an attention.",
        needs="Hopper GPU, package fa3-fwd",
        unavailable=_without_fa3,
        dtypes=("bf16",),
    ),
    words=("auto", "fastest"),
    unknown=ResourceError,
)


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend that `auto` stands for.

    In half precision on a Hopper GPU or later: fa3 in bf16 if installed, else cudnn. Otherwise sdpa.
    """
    return ATTENTION.resolve("auto", device, dtype).name


def create_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, AttentionFn]:
    """The backend called `name` (or what `auto` stands for), as (name, function).

    Raises ResourceError if the name is unknown or the backend cannot be used on `device` or in `dtype`.
    """
    backend = ATTENTION.resolve(name, device, dtype)
    if backend.dtypes and precision_name(dtype) not in backend.dtypes:
        takes = " and ".join(backend.dtypes)
        raise ResourceError(
            f"attention: {backend.name} computes in {takes}, not in {precision_name(dtype)}; "
            f"set dtype={backend.dtypes[0]} or attention=auto"
        )
    return backend.name, backend.create(device)
