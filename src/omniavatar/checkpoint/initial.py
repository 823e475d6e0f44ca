"""Random weights with the scale of trained ones, so that activations stay finite and of order one.

One rule serves every model of the project. It depends on a weight's name and shape: norms are near 1,
matrices scale with 1/sqrt(inputs), and matrices that write to a residual stream are smaller. Synthetic
checkpoints and `weights: random` use it, for timings and memory. The numbers are uniform, because these are
exact functions of integers: the bytes are the same on every machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import nn

NORM = re.compile(r"(?:^|[._])(?:norm\w*|layer_norm|final_layer_norm)\.weight$|gamma$|weight_g$|original0$")
DAMPED = re.compile(r"(?:attn|SelfAttention)\.o\.weight$|ffn\.(?:2|fc2)\.weight$|\.wo\.weight$")
TEXT_QUERY = re.compile(r"(?:\.attn|SelfAttention)\.q\.weight$")
LORA_UP = re.compile(r"lora_B\b.*weight$")
DAMPING = 0.2
TEXT_HEAD_DIM = 64


def initial_spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of the random weight `key`, a name as in the released files."""
    if NORM.search(key):
        return 1.0, 0.02
    if key.endswith(".bias") or len(shape) < 2:
        return 0.0, 0.02
    if key.endswith("token_embedding.weight"):
        return 0.0, 1.0
    if key.endswith("pos_embedding.embedding.weight"):
        return 0.0, 0.3
    inputs = shape[-1] if key.endswith("modulation") else math.prod(shape[1:])
    std = 1.0 / math.sqrt(inputs)
    if LORA_UP.search(key):
        return 0.0, 0.2 * std
    if TEXT_QUERY.search(key):
        return 0.0, std / math.sqrt(TEXT_HEAD_DIM)
    return 0.0, std * (DAMPING if DAMPED.search(key) else 1.0)


def random_weight(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """The next random weight of `generator`, on its device, distributed as in `initial_spread`."""
    mean, std = initial_spread(key, shape)
    half_width = std * math.sqrt(3.0)
    value = torch.empty(shape, dtype=dtype, device=generator.device)
    return value.uniform_(mean - half_width, mean + half_width, generator=generator)


def fill_random(
    module: nn.Module,
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    device: torch.device | str,
    seed: int,
    move_to: torch.device | str | None = None,
) -> None:
    """Fill a module on the meta device with random weights, made directly on `device`.

    The numbers depend on seed, device and dtype.

    dtype: of all weights, or a function of the weight's name.
    move_to: final device of each weight; None for `device`.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        chosen = dtype if isinstance(dtype, torch.dtype) else dtype(name)
        value = random_weight(name, tuple(parameter.shape), chosen, generator)
        parent, _, leaf = name.rpartition(".")
        setattr(
            module.get_submodule(parent), leaf, nn.Parameter(value.to(move_to or device), requires_grad=False)
        )
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(module).__name__} has tensors left on the meta device: {left}")
