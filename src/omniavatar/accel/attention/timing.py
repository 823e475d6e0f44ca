"""The fastest exact attention of a device by measurement, for `attention: fastest`.

Each exact backend with a rank runs self-attention of the model's heads over a fixed number of tokens; the
smallest median wins. Backends round differently, so noise must not change the choice: a backend within 3 % of
the fastest is taken in its place if it has a better rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from omniavatar.accel.attention.registry import ATTENTION, create_attention
from omniavatar.device import Backend

if TYPE_CHECKING:
    from omniavatar.model.attention import AttentionFn

TOKENS = {"cuda": 8192, "cpu": 512}
WARM_UP, REPEATS, NEAR = 2, 5, 1.03


def timed_backends(device: torch.device) -> list[Backend]:
    """The backends that `fastest` times on this device, the best rank first."""
    return [backend for backend in ATTENTION.ranked(device) if backend.exact]


def attention_seconds(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> dict[str, float]:
    """Median seconds of one self-attention for each timed backend, the best rank first.

    A backend whose kernel does not take this dtype or head size is left out.
    """
    tokens = TOKENS.get(device.type, TOKENS["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    seconds: dict[str, float] = {}
    for backend in timed_backends(device):
        attention = backend.create(device)
        try:
            seconds[backend.name] = _median(lambda run=attention: run(q, k, v), device)  # type: ignore[misc]
        except RuntimeError:
            continue
    return seconds


def pick(seconds: Mapping[str, float]) -> str:
    """The first name whose time is within 3 % of the best. seconds: the preferred backend first."""
    best = min(seconds.values())
    return next(name for name, value in seconds.items() if value <= best * NEAR)


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> tuple[str, AttentionFn, str | None]:
    """The backend called `name`, as (name, function, message about the measurement).

    `fastest` measures; without it the message is None. Raises ResourceError if the name is unknown or the
    backend cannot be used on `device`.
    """
    if name != "fastest":
        return (*create_attention(name, device, dtype), None)
    with torch.inference_mode():
        seconds = attention_seconds(device, dtype, heads, head_dim)
    chosen = pick(seconds)
    ranked = sorted(seconds.items(), key=lambda item: item[1])
    figures = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in ranked)
    tokens = TOKENS.get(device.type, TOKENS["cpu"])
    line = f"attention: {chosen} (measured at {heads} heads x {tokens} tokens: {figures})"
    return (*create_attention(chosen, device, dtype), line)


def _median(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for number in range(WARM_UP + REPEATS):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
