"""The measured peak rates of a device, which a run's TFLOP/s are compared with.

The floor of some work is its matrix products at the matrix ceiling plus its attention at the attention
ceiling, one after the other. For the devices in `MEASURED` the ceilings are the rates of the fastest kernels
that this project has timed on them (docs/lab_notes.md). `probe` times any other device at once, with the
matrix product and the attention that PyTorch chooses; a better kernel may be faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.functional import scaled_dot_product_attention

from omniavatar.device import device_name
from omniavatar.measure.flops import Work

HALF = (torch.bfloat16, torch.float16)
REPEATS = 4


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of a device in one arithmetic. source: where the figures come from."""

    device: str
    arithmetic: str
    matrix: float
    attention: float
    source: str

    def floor_seconds(self, work: Work) -> float:
        """The least time that `work` takes on this device."""
        return (work.matrix / self.matrix + work.attention / self.attention) / 1e12


@dataclass(frozen=True)
class _Measured:
    matrix: float
    attention: float
    matrix_fp8: float
    attention_fp8: float
    source: str


_H100 = (
    "bf16 product 8192^3; attention, head dim 128, 40 x 30,375 (FlashAttention-3); one H100 SXM, torch 2.11"
)
MEASURED: Mapping[str, _Measured] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": _Measured(784.0, 698.0, 1500.0, 938.0, f"measured: {_H100}"),
        "NVIDIA H200": _Measured(
            784.0,
            698.0,
            1500.0,
            938.0,
            f"figures of an H100 SXM, which has the same chip; not measured on an H200: {_H100}",
        ),
    }
)
"""By the device's name in CUDA; fp8 with a scale for each row."""


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device for weights of `dtype`: from the table, else probed (a second or two)."""
    name = device_name(device)
    known = MEASURED.get(name)
    if known is not None and dtype in HALF:
        return Ceilings(name, _short(dtype), known.matrix, known.attention, known.source)
    return probe(device, dtype)


def fp8_ceilings(device: torch.device) -> Ceilings | None:
    """The ceilings with fp8 products and fp8 attention; None where they have not been measured."""
    known = MEASURED.get(device_name(device))
    if known is None:
        return None
    return Ceilings(
        device_name(device), "fp8", known.matrix_fp8, known.attention_fp8, known.source.replace("bf16", "fp8")
    )


@torch.inference_mode()
def probe(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time one matrix product and one attention on the device; the fastest of a few runs counts."""
    on_gpu = device.type == "cuda"
    side, tokens, heads = (8192, 8192, 12) if on_gpu else (1024, 1024, 4)
    a = torch.randn(side, side, device=device, dtype=dtype)
    q = torch.randn(1, heads, tokens, 128, device=device, dtype=dtype)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    product = _fastest(lambda: a @ a, wait)
    attention = _fastest(lambda: scaled_dot_product_attention(q, q, q), wait)
    return Ceilings(
        device_name(device),
        _short(dtype),
        2 * side**3 / product / 1e12,
        4 * heads * tokens**2 * 128 / attention / 1e12,
        f"probed just now: {_short(dtype)} product {side}^3, PyTorch attention {heads} x {tokens}",
    )


def _fastest(run: Callable[[], object], wait: Callable[[], None]) -> float:
    run()
    wait()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))
