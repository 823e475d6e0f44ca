"""Precisions of the DiT's linear layers (`quantize`) by name; `accel.quantized` has the layers themselves.

`create` takes nothing and returns the dtype that rows are quantised to, None if nothing is quantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omniavatar.device import Backend, Registry, capability, device_name

if TYPE_CHECKING:
    import torch


def _exact() -> None:
    return None


def _float8() -> torch.dtype:
    import torch

    return torch.float8_e4m3fn


def _int8() -> torch.dtype:
    import torch

    return torch.int8


def _lacks_products(form: str, device: torch.device, needed: tuple[int, int]) -> str | None:
    """The CPU runs slow equivalents of every form."""
    if device.type != "cuda" or capability(device) >= needed:
        return None
    version = ".".join(map(str, needed))
    return f"{device_name(device)} has no {form} products, which need compute capability {version}"


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


PRECISIONS: Registry[Backend] = Registry(
    "runtime.quantize",
    Backend(name="none", create=_exact, exact=True, doc="The weights' own precision (`dtype`)."),
    Backend(
        name="fp8",
        create=_float8,
        exact=False,
        doc="float8 linear layers: faster, half the memory, 1.5 to 4 % error a forward.",
        needs="Ada or Hopper GPU or later",
        unavailable=lambda device: _lacks_products("fp8", device, (8, 9)),
        rank=2,
        suits=_on_gpu,
    ),
    Backend(
        name="int8",
        create=_int8,
        exact=False,
        doc="int8 linear layers, for GPUs without float8: faster, half the memory, more error on outliers.",
        needs="Ampere GPU or later",
        unavailable=lambda device: _lacks_products("int8", device, (8, 0)),
        rank=1,
        suits=_on_gpu,
    ),
    words=("auto",),
)


def check_quantize(form: str, device: torch.device) -> None:
    """Raise ResourceError if the device has no products of `form`."""
    PRECISIONS.usable(form, device)


def best_quantize(device: torch.device) -> str | None:
    """The form that a GPU runs faster than bf16: fp8, else int8, else None. None for a CPU."""
    best = PRECISIONS.choose(device)
    return None if best is None else best.name


QUANTIZED = (
    *(f"self_attn.{name}" for name in "qkvo"),
    *(f"cross_attn.{name}" for name in "qo"),
    "ffn.0",
    "ffn.2",
)
