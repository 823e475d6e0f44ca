"""Attention backends by name, behind one signature.

Shapes: B batch, L query tokens, S key tokens, H heads, D head dim. Every backend is an `AttentionFn`:
q (B, L, H, D), k and v (B, S, H, D) -> (B, L, H, D), softmax scale 1/sqrt(D), no mask, dtype of q.
A name that is unknown, or that cannot run on the device, is an error that lists what can. `auto` is a
choice made once from the device and logged by the caller, never a fallback while running.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from omniavatar.accel.kernels.fused import create_fused
from omniavatar.errors import ResourceError
from omniavatar.model.attention import AttentionFn


def _torch_attention(backend: SDPBackend | None) -> AttentionFn:
    def pinned() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def attention(q_BLHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Tensor:
        with pinned():
            out = scaled_dot_product_attention(
                q_BLHD.transpose(1, 2), k_BSHD.transpose(1, 2), v_BSHD.transpose(1, 2)
            )
        return out.transpose(1, 2)

    return attention


_TORCH_BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_CUDA_ONLY = frozenset({"efficient", "cudnn"})
_FA3 = ("fa3", "fa3_fp8")
_HINTS = {
    **dict.fromkeys(_FA3, " (FlashAttention-3 needs a Hopper GPU and `pip install fa3-fwd`)"),
    "sage": " (SageAttention needs an Ampere GPU or later and `pip install sageattention`)",
    "flex": " (FlexAttention needs a CUDA GPU and triton)",
}


def available_backends(device: torch.device) -> list[str]:
    """Names `create_attention` accepts on this device, besides `auto`."""
    names = [name for name in _TORCH_BACKENDS if device.type == "cuda" or name not in _CUDA_ONLY]
    if device.type == "cuda" and _installed("triton"):
        names.append("flex")
        if _installed("sageattention") and torch.cuda.get_device_capability(device)[0] >= 8:
            names.append("sage")
    return [*names, *_FA3] if _has_fa3(device) else names


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _has_fa3(device: torch.device) -> bool:
    return _is_hopper(device) and _installed("fa3_fwd_interface")


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` means in half precision on a GPU: FlashAttention-3 on Hopper where it is installed, else
    cuDNN from Hopper on (the fastest measured); everywhere else PyTorch's own choice. Never a float8 one."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        if _has_fa3(device):
            return "fa3"
        if torch.cuda.get_device_capability(device)[0] >= 9:
            return "cudnn"
    return "sdpa"


def create_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, AttentionFn]:
    """The backend called `name` (or what `auto` chooses), as (name, function).

    Raises ResourceError for a name that does not exist or cannot run on `device`.
    """
    chosen = choose_backend(device, dtype) if name == "auto" else name
    there = available_backends(device)
    if chosen not in there:
        raise ResourceError(
            f"attention: {chosen!r} cannot run on {device.type}{_HINTS.get(chosen, '')}; use one of: auto, "
            f"fastest, {', '.join(there)}"
        )
    if chosen in ("sage", "flex"):
        from omniavatar.accel.attention.packages import FlexAttention, SageAttention

        return chosen, SageAttention() if chosen == "sage" else FlexAttention()
    if chosen in _FA3:
        from omniavatar.accel.attention.fa3 import Fa3Attention, Fa3Float8Attention

        return chosen, Fa3Attention() if chosen == "fa3" else Fa3Float8Attention(create_fused(device))
    return chosen, _torch_attention(_TORCH_BACKENDS[chosen])
