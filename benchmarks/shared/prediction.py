"""Seconds that N GPUs of one host should take, from what one takes and from the bytes that they exchange.

The formulas and their constants are those of docs/many_gpus.md, "Prediction". Figures of an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LINK = 250e9
"""Bytes a second between two GPUs in an all-to-all."""
COPY = 3.5e12
"""Bytes a second of a copy inside a GPU."""
SWAP_S, PASS_S = 0.14e-3, 1.3e-3
"""An exchange of the VAE's rows; what a decoding pass adds."""
ONE_CODING_S, ROWS, LATENTS = 0.65, 50, 27
"""Decode and encode of a window on one GPU; latent rows and latents of 400x720, 105 frames."""


@dataclass(frozen=True)
class Model:
    """A DiT at 30,375 tokens. forward_s: of one GPU."""

    forward_s: float
    width: int
    layers: int
    heads: int
    tokens: int = 30375

    @property
    def bytes(self) -> int:
        """Bytes of one tensor of tokens in bf16."""
        return 2 * self.tokens * self.width


MODELS = {"14B": Model(2.19, 5120, 40, 40), "1.3B": Model(0.381, 1536, 30, 12)}


def exchange_s(model: Model, gpus: int) -> float:
    """All exchanges of one forward whose heads are shared by the ranks that divide them.

    The others' keys and values are gathered: each rank receives them from all that hold other tokens.
    """
    if gpus == 1:
        return 0.0
    by_heads = math.gcd(gpus, model.heads)
    rows = gpus // by_heads
    all_to_all = 4 * model.bytes * (by_heads - 1) / (by_heads * gpus) / LINK
    gathered = 2 * model.bytes * (rows - 1) / (rows * by_heads) / LINK
    return model.layers * (all_to_all + gathered)


def forward_s(scale: str, gpus: int) -> float:
    """One forward by sequence parallelism over `gpus`."""
    model = MODELS[scale]
    if gpus == 1:
        return model.forward_s
    packing = 4 * model.layers * 2 * model.bytes / gpus / COPY
    gather = model.bytes * (gpus - 1) / gpus / LINK
    return model.forward_s / gpus + exchange_s(model, gpus) + packing + gather


def step_s(scale: str, gpus: int) -> float:
    """A step of two guidance branches on two groups of `gpus` / 2."""
    return 2 * forward_s(scale, 1) if gpus == 1 else forward_s(scale, gpus // 2)


def coding_s(gpus: int) -> float:
    """Decode and encode of a window, its picture rows shared."""
    if gpus == 1:
        return ONE_CODING_S
    passes = 1 + math.ceil((LATENTS - 1) / (2 * gpus))
    rows = math.ceil(ROWS / gpus) / ROWS
    return ONE_CODING_S * rows + (33 * passes + 50) * SWAP_S + PASS_S * passes


def window_s(scale: str, gpus: int, steps: int) -> float:
    """A window of `steps` forwards without guidance."""
    return steps * forward_s(scale, gpus) + coding_s(gpus)
