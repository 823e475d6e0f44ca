"""The fastest exact attention of a device by measurement, for `attention: fastest`.

Each exact backend runs self-attention of the model's heads over a fixed number of tokens; the smallest median
wins. One within 3 % of it that stands earlier in `PREFERENCE` is taken in its place, so that noise does not
turn the choice, since another backend rounds differently.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from omniavatar.accel.attention.registry import available_backends, create_attention
from omniavatar.model.attention import AttentionFn

PREFERENCE = ("fa3", "cudnn", "flash", "flex", "efficient", "sdpa")
"""Exact backends that are timed (float8 and int8 ones are not, `math` is never fast)."""
TOKENS = {"cuda": 8192, "cpu": 512}
WARM_UP, REPEATS, NEAR = 2, 5, 1.03


def attention_seconds(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> dict[str, float]:
    """Median seconds of one self-attention by each exact backend there; one that refuses is left out."""
    tokens = TOKENS.get(device.type, TOKENS["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    there = available_backends(device)
    seconds: dict[str, float] = {}
    for name in PREFERENCE:
        if name not in there:
            continue
        _, attention = create_attention(name, device, dtype)
        try:
            seconds[name] = _median(lambda run=attention: run(q, k, v), device)  # type: ignore[misc]
        except RuntimeError:
            continue
    return seconds


def pick(seconds: Mapping[str, float]) -> str:
    """The name to take: the fastest, or a preferred one as good as it."""
    best = min(seconds.values())
    return next(name for name in PREFERENCE if seconds.get(name, float("inf")) <= best * NEAR)


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> tuple[str, AttentionFn, str | None]:
    """The backend called `name`, measured where that is `fastest`: (name, function, line about measuring).

    Raises ResourceError for a name that does not exist or cannot run on `device`.
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
